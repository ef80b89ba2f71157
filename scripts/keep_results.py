"""Keeps runs as records of this repository: python scripts/keep_results.py FOLDER TARGET, TARGET a folder in results/.

What is dropped: texts of the data sets (their licences are not ours), paths but for their last part, and the
description of the machine. What the report reads, every figure of every document and which documents share a passage
among it, stays as lm_eval wrote it. A sweep's folder stays one: `cp -r TARGET/. OUT` and `intactkv sweep FILE --out
OUT` go on where it was.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from intactkv_eval.report.clusters import KEY, clusters_of

_MACHINE = ("pretty_env_info", "upper_git_hash", "git_hash", "config_source")
_PATH = re.compile(r"/\S+/([^/\s]+)")


def keep(folder: Path, target: Path) -> None:
    """Copy every finished results file below `folder`, with the figures of its samples; and a sweep's plan."""
    for file in sorted(folder.rglob("results_*.json")):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        stamp = file.name.removeprefix("results_").removesuffix(".json")
        for record in (folder / "cells").glob("*/record.json"):
            if file.is_relative_to(record.parent):
                out = target / "cells" / record.parent.name
                _copy(record, out)
                break
        else:
            out = target
        _copy(file, out)
        for samples in sorted(file.parent.glob(f"samples_*_{stamp}.jsonl")):
            rows = [json.loads(line) for line in samples.read_text().splitlines()]
            clusters = clusters_of(rows)
            kept = [
                {key: row[key] for key in ("doc_id", "doc_hash", *row["metrics"])}
                | ({KEY: {clusters.field: clusters.of[row["doc_id"]]}} if clusters.field else {})
                for row in rows
            ]
            (out / samples.name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    if (folder / "sweep.json").is_file():
        _copy(folder / "sweep.json", target)


def _copy(file: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    content = _ours(json.loads(file.read_text()))
    (out / file.name).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _ours(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _ours(part) for key, part in value.items() if key not in _MACHINE}
    if isinstance(value, list):
        return [_ours(part) for part in value]
    return _PATH.sub(r"\1", value) if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
