"""The journal of a judge: every reply as it comes, one line each, on disk before the next is asked for.

    replies.jsonl: {"key", "judge", "server", "prompt", "kind", "models", "question_id", "turn", "choice",
                    "user_prompt", "reply", "finish", "tokens", "verdict", "attempt", "tstamp"}

A line that a kill has cut off is left out and written over. verdict: null where the reply holds none.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, model_validator

from intactkv_eval.documents import parse_json
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.verdict import WINNERS, is_rating

NAME = "replies.jsonl"


class Line(BaseModel):
    """One reply, and to what."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    key: str
    judge: str
    server: str | None
    prompt: str
    kind: str
    models: tuple[str, ...]
    question_id: int
    turn: int
    choice: int
    user_prompt: str
    reply: str
    finish: str | None
    tokens: tuple[int, int] | None
    verdict: float | str | None
    attempt: int
    tstamp: float

    @model_validator(mode="after")
    def _check_verdict(self) -> "Line":
        """A rating from 1 to 10, or a winner: nothing else is a verdict, and a winner that nobody knows is no tie."""
        known = is_rating(self.verdict) if self.kind == "single" else self.verdict in WINNERS
        if self.verdict is not None and not known:
            raise ValueError(f"verdict {self.verdict}")
        return self


class Journal:
    """The replies of one folder, by key the last of each; open for one process at a time."""

    def __init__(self, handle: IO[bytes], lines: dict[str, Line]) -> None:
        self._handle, self.lines = handle, lines
        self.added = 0
        self._turn = threading.Lock()

    def add(self, line: Line) -> None:
        """Keep a reply. When this returns it is on disk. Raises ConfigError where it cannot be written."""
        written = line.model_dump_json().encode() + b"\n"
        with self._turn:
            end = os.fstat(self._handle.fileno()).st_size
            try:
                kept = self._handle.write(written)
                if kept != len(written):  # as on a disk that fills up
                    raise OSError(errno.ENOSPC, f"{kept} of {len(written)} bytes")
                os.fsync(self._handle.fileno())
            except OSError as error:
                os.ftruncate(self._handle.fileno(), end)  # half a line would spoil those behind it
                raise ConfigError(f"{NAME}: a reply cannot be written ({error}); make room and run again") from None
            self.lines[line.key] = line
            self.added += 1


@contextmanager
def opened(folder: Path) -> Iterator[Journal]:
    """The journal of a folder, made where there is none.

    Raises ConfigError where another process has it open, DataError for a damaged line that is not the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    with path.open("a+b", buffering=0) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{path}: another intactkv judge is writing; wait for it, or name another --out"
            ) from None
        handle.seek(0)
        content = handle.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            handle.truncate(whole)
        yield Journal(handle, read_lines(path, content[:whole]))


def read_lines(path: Path, content: bytes) -> dict[str, Line]:
    """Whole lines by key, the last of several. Raises DataError that names a damaged one."""
    found = {}
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row: Any = parse_json(text)
            line = Line.model_validate(row)
        except ValueError as error:  # pydantic's among them
            raise DataError(f"{path}, line {number}: no reply of a judge ({type(error).__name__})") from None
        found[line.key] = line
    return found
