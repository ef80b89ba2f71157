"""The table of docs/reliability.md that says what is read from strangers, and within which limits.

    python scripts/limits_table.py [--write docs/reliability.md]

The limits are those of intactkv_eval/storage/limits.py; tests/storage/test_limits.py fails where the page has others.
"""

import argparse
from pathlib import Path

from intactkv_eval.storage.limits import table

MARK = "<!-- limits -->"


def written(page: str) -> str:
    """The page with today's table between its marks."""
    head, _, rest = page.partition(MARK)
    return f"{head}{MARK}\n{table()}\n{MARK}{rest.partition(MARK)[2]}"


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", type=Path, help="put the table between the marks of this page")
    asked = options.parse_args()
    if asked.write:
        asked.write.write_text(written(asked.write.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())
