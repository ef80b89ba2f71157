"""The dates by which lm_eval names results files: known to us, and never those of files that are there.

lm_eval 0.4.13 to 0.5.0.dev1 name files by `datetime.now()` of evaluation_tracker.py. A clock that gives two runs one
microsecond, or goes back, would let the second run replace the first one's results, and add its samples to theirs.

    results_<stamp>.json (or NAME_<stamp>.json), samples_<task>_<stamp>.jsonl
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, tzinfo
from functools import wraps
from pathlib import Path
from typing import Any

from intactkv_eval.compat.lm_eval_api import EvaluationTracker, evaluation_tracker
from intactkv_eval.storage.files import locked

_LOCK = ".results.lock"


@contextmanager
def stamps_of_results() -> Iterator[list[str]]:
    """The dates by which this process names results files while it lasts, of which no other file has one.

    Two processes may share a folder: each date is chosen, and its results file written, by one at a time.
    """
    stamps: list[str] = []
    save = EvaluationTracker.save_results_aggregated

    @wraps(save)
    def noted(tracker: Any, *arguments: Any, **named: Any) -> Any:
        try:
            with _free_dates(_folder_of(tracker)):
                return save(tracker, *arguments, **named)
        finally:
            stamps.extend([tracker.date_id] if getattr(tracker, "date_id", None) else [])

    EvaluationTracker.save_results_aggregated = noted
    try:
        yield stamps
    finally:
        EvaluationTracker.save_results_aggregated = save


def _folder_of(tracker: Any) -> Path | None:
    """Where lm_eval is about to write; None where it writes nothing."""
    if not getattr(tracker, "output_path", None):
        return None
    path = Path(tracker.output_path)
    if path.suffix == ".json":
        return path.parent
    return path / str(tracker.general_config_tracker.model_name_sanitized)


@contextmanager
def _free_dates(folder: Path | None) -> Iterator[None]:
    """While it lasts, lm_eval's clock passes over the dates that files in `folder` have; one process at a time.

    Where nothing can be written there, lm_eval itself finds out.
    """
    with ExitStack() as held:
        try:
            if folder is not None:
                held.enter_context(locked(folder / _LOCK))
        except OSError:
            folder = None
        if folder is None:
            yield
            return
        names = evaluation_tracker.__dict__
        before = names["datetime"]
        names["datetime"] = _clock(before, {_stamp_in(path) for path in folder.iterdir()})
        try:
            yield
        finally:
            names["datetime"] = before
            with suppress(OSError):
                (folder / _LOCK).unlink()


def _stamp_in(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _clock(source: type[datetime], taken: set[str]) -> type[datetime]:
    """`source`, whose present is a microsecond later where files have its date."""

    class FreeDates(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            found = source.now(tz)
            while found.isoformat().replace(":", "-") in taken:
                found += timedelta(microseconds=1)
            return found

    return FreeDates
