"""docs/architecture.md is what the code says: its order, its rooms, and the files that it sends a change to."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_generated():
    page = runpy.run_path(str(ROOT / "scripts" / "architecture.py"))["page"]()
    assert (ROOT / "docs" / "architecture.md").read_text() == page, (
        "run python scripts/architecture.py --write docs/architecture.md"
    )


def test_changes_are_sent_to_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    paths = re.findall(r"`([a-z_/]+(?:/|\.py))`", page.partition("## Where a change goes")[2])
    assert len(paths) > 15
    places = (
        ROOT / "intactkv_eval",
        ROOT,
        ROOT / "kernels" / "intactkv_kernels",
        ROOT / "intactkv_eval" / "weights" / "formats",
    )
    for path in paths:
        assert any((place / path).exists() for place in places), path


def test_every_room_says_what_it_does_not_know():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = [row for row in page.splitlines() if re.match(r"\| `[a-z_]+/` \| ", row)]
    assert len(rows) > 18
    assert all("Knows" in row for row in rows), [row for row in rows if "Knows" not in row]
