"""The kills in short; `make kills` does fifty of each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import works


@pytest.mark.slow
@pytest.mark.parametrize("work", sorted(works.WORKS))
def test_killed_works_end_as_undisturbed(work):
    script = Path(__file__).parents[1] / "stress" / "kills.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "3", "--only", work],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"{work}: 3 kills" in done.stdout
