"""The folder of a sweep as the report sees it: which results count, and which cells have none, and why.

FOLDER/sweep.json         the plan (sweep/folder.py): key, task, seed and cell of every unit
FOLDER/cells/KEY/         its results
FOLDER/failed/KEY.json    why there are none
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intactkv_eval.cell.records import check_format
from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.limits import read_bytes

PLAN, CELLS, FAILED = "sweep.json", "cells", "failed"
MISSING = "missing"


@dataclass(frozen=True)
class Absent:
    """A unit without a result. record: its cell, as a run records it. why: MISSING, or the error it ended with."""

    record: Mapping[str, Any]
    task: str
    seed: int | None
    why: str

    @property
    def word(self) -> str:
        """For a table."""
        return MISSING if self.why == MISSING else "failed"


def files_below(folder: Path) -> list[Path]:
    """The results files below `folder`; of a sweep those alone that its plan holds and that are finished.

    Raises ConfigError for a damaged plan.
    """
    kept = {unit["key"] for unit in _plan(folder)}
    return [file for file in sorted(folder.rglob("results_*.json")) if _counts(file.relative_to(folder).parts, kept)]


def absent_of(folders: Iterable[Path]) -> list[Absent]:
    """What the sweeps of these folders lack, in their plans' order. Raises ConfigError for a damaged plan."""
    return [
        Absent(unit, unit["task"], unit.get("seed"), _why(folder, unit["key"]))
        for folder in folders
        if folder.is_dir()
        for unit in _plan(folder)
        if not any((folder / CELLS / unit["key"]).rglob("results_*.json"))
    ]


def _counts(parts: tuple[str, ...], kept: set[str]) -> bool:
    if any(part.startswith(".") for part in parts):
        return False
    return not kept or parts[0] != CELLS or parts[1] in kept


def _plan(folder: Path) -> list[dict[str, Any]]:
    path = folder / PLAN
    if not path.is_file():
        return []
    try:
        found = parse_json(read_bytes(path))
        for unit in found:
            check_format(unit, path)
        return [
            {**unit, "key": _key(unit["key"]), "task": str(unit["task"]), "seed": _seed(unit.get("seed"))}
            for unit in found
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: not a sweep's plan ({error}); `intactkv sweep` writes it anew") from None


def _key(value: object) -> str:
    """It names a file, so it is nothing but letters and digits."""
    if not isinstance(value, str) or not re.fullmatch("[0-9A-Za-z]{1,64}", value):
        raise ValueError(f"the key {str(value)[:80]!r}")
    return value


def _seed(value: object) -> int | None:
    if value is not None and not isinstance(value, int):
        raise ValueError(f"the seed {str(value)[:80]!r}")
    return value


def _why(folder: Path, key: str) -> str:
    path = folder / FAILED / f"{key}.json"
    if not path.is_file():
        return MISSING
    try:
        return str(parse_json(read_bytes(path))["error"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: damaged ({error}); remove it, and run the sweep again") from None
