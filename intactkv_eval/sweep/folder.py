"""A sweep's folder on disk: what is planned, done, failed and made. Knows files; no models, no processes.

    sweep.json            the plan: every unit of the grid, for the report
    begun.json            when it was begun: what chat templates that write a date read, in every cell
    cells/KEY/            lm_eval's results and samples, and record.json; put there whole, by one rename
    failed/KEY.json       why a unit has no result
    made/ logs/ responses/ .partial/

One sweep at a time works on a folder.
"""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.planned import CELLS, FAILED, PLAN
from intactkv_eval.sanitize import struck_record
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import locked, place_folder, write_atomic
from intactkv_eval.storage.limits import read_bytes

RECORD, BEGUN = "record.json", "begun.json"
_MOST_SECONDS = 1e9  # thirty years: no unit took longer


class SweepFolder:
    """The folder `path`, made where it is missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def made(self) -> Path:
        """Where preparations lie."""
        return self.path / "made"

    def log(self, key: str) -> Path:
        """What the unit printed."""
        return self.path / "logs" / f"{key}.txt"

    def partial(self, key: str) -> Path:
        """Where the unit's results are written; new and empty after `start`."""
        return self.path / ".partial" / key

    def responses(self, key: str) -> Path:
        """lm_eval's response cache of the unit."""
        return self.path / "responses" / key

    def cell(self, key: str) -> Path:
        """Where its results lie once it is done."""
        return self.path / CELLS / key

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Raises ConfigError where another process works on this folder."""
        with locked(self.path / ".lock", wait=False) as ours:
            if not ours:
                raise ConfigError(f"{self.path}: another sweep works on it; wait for it, or name another --out")
            yield

    def plan(self, units: Sequence[Mapping[str, Any]]) -> None:
        """Write what is to be done, for the report."""
        _write(self.path / PLAN, list(units))

    def begun(self, now: str) -> str:
        """When the sweep was first begun, in ISO 8601: `now`, where it was not yet. Raises ConfigError if damaged."""
        path = self.path / BEGUN
        if not path.is_file():
            _write(path, {"begun": now})
        try:
            found: str = parse_json(read_bytes(path))["begun"]
            return datetime.fromisoformat(found).isoformat()
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: is damaged ({error}); expected the date of the sweep's start") from None

    def is_done(self, key: str) -> bool:
        """Whether its results are there, whole."""
        return (self.cell(key) / RECORD).is_file()

    def seconds(self, key: str) -> float | None:
        """How long the unit took, by what `place` was given; None where it is not done, or its record is damaged."""
        try:
            found = parse_json(read_bytes(self.cell(key) / RECORD))["seconds"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return float(found) if isinstance(found, int | float) and 0 <= found < _MOST_SECONDS else None

    def start(self, key: str) -> Path:
        """A new empty folder for its results."""
        folder = self.partial(key)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def place(self, key: str, record: Mapping[str, Any]) -> None:
        """Its partial folder becomes its result: on disk first, then by one rename."""
        folder, target = self.partial(key), self.cell(key)
        _write(folder / RECORD, record)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)  # never whole: `is_done` said so
        place_folder(folder, target)
        (self.path / FAILED / f"{key}.json").unlink(missing_ok=True)
        for left in self.path.glob(f"responses/{key}*"):
            left.unlink()

    def fail(self, key: str, why: str) -> None:
        """Keep why it has no result."""
        _write(self.path / FAILED / f"{key}.json", {"error": why})
        shutil.rmtree(self.partial(key), ignore_errors=True)


def _write(path: Path, value: Any) -> None:
    text = json.dumps(struck_record(value), indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
