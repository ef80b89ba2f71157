"""Keeps runs as records of this repository: python results/keep.py FOLDER... writes into results/reference.

What is dropped: texts of the data sets (their licences are not ours), paths and the description of the machine. What
the report reads, every figure of every document among it, stays as lm_eval wrote it.
"""

import json
import sys
from pathlib import Path

TARGET = Path(__file__).parent / "reference"
_MACHINE = ("pretty_env_info", "upper_git_hash", "git_hash")


def keep(folder: Path) -> None:
    """Copy every results file below `folder`, with the figures of its samples."""
    for file in sorted(folder.rglob("results_*.json")):
        content = json.loads(file.read_text())
        for key in _MACHINE:
            content.pop(key, None)
        for config in content["configs"].values():
            config.get("metadata", {}).pop("config_source", None)
        TARGET.mkdir(exist_ok=True)
        (TARGET / file.name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        stamp = file.name.removeprefix("results_").removesuffix(".json")
        for samples in sorted(file.parent.glob(f"samples_*_{stamp}.jsonl")):
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
            kept = [{key: row[key] for key in ("doc_id", "doc_hash", *row["metrics"])} for row in rows]
            (TARGET / samples.name).write_text("".join(json.dumps(row) + "\n" for row in kept))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        keep(Path(argument))
