"""Law 13: every README command runs, its links lead somewhere, and its table is the records'."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def runnable(tool):
    return [command for command in COMMANDS if shlex.split(command)[0] == tool]


def test_every_command_is_of_a_kind_that_a_test_runs():
    assert {shlex.split(command)[0] for command in COMMANDS} <= {"make", "pip", "lm_eval", "intactkv"}
    assert runnable("lm_eval")
    assert runnable("intactkv")


def test_make_targets_exist():
    targets = [shlex.split(command)[1] for command in runnable("make")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_pip_lines_name_what_exists():
    for command in runnable("pip"):
        extras = re.findall(r"intactkv-eval\[(\w+)\]", command)
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)


@pytest.mark.slow
@pytest.mark.parametrize("command", runnable("lm_eval") + [c for c in runnable("intactkv") if "report" not in c])
def test_commands(command, smollm2, tmp_path, request):
    """As written, but for the model (the demo's, offline), a limit, and the output's place."""
    words = shlex.split(
        command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2)).replace("results/mine", str(tmp_path))
    )
    if words[0] == "lm_eval" or words[1] == "eval":
        words += ["--limit", "2", "--device", "cpu", "--metadata", "ppl_window=256"]
    if "config=" in command:
        words = [w.replace("config=", f"pretrained={smollm2},config=") if w.startswith("config=") else w for w in words]
    needs_data = "wikitext" in command
    env = {
        **os.environ,
        **({"INTACTKV_DATA": str(request.getfixturevalue("shared_hub"))} if needs_data else {}),
        "INTACTKV_CACHE": str(smollm2.parent.parent),
    }
    cwd = ROOT if "pivots/" not in command else tmp_path
    (tmp_path / "pivots").mkdir()
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=cwd, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_links():
    for target in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README):
        assert (ROOT / target).exists(), target


def test_the_generated_tables_are_the_records(tmp_path):
    """results/README.md, and the table of README.md, are what the report makes of results/reference."""
    out = tmp_path / "table.md"
    subprocess.run([str(BIN / "intactkv"), "report", "results/reference", "--out", str(out)], cwd=ROOT, check=True)
    table = out.read_text()
    assert (ROOT / "results" / "README.md").read_text() == table
    for line in table.splitlines():
        if line.startswith("|"):
            assert line in README
