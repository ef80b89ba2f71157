"""The journal of a judge: every reply as it comes, one line each, on disk before the next is asked for.

    replies.jsonl: {"key", "judge", "server", "prompt", "kind", "models", "question_id", "turn", "choice",
                    "user_prompt", "reply", "finish", "tokens", "verdict", "attempt", "tstamp",
                    "references", "temperature", "cost", "error"}

A line that a kill has cut off is left out and written over. verdict: null where the reply holds none; such a reply is
read again by today's rules. Lines of before the last four keys were there are read too. A line with an `error` holds no
reply: it stands for a request that may be billed all the same.
"""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.cost import Prices
from intactkv_eval.judge.matches import MatchKey
from intactkv_eval.judge.verdict import WINNERS, is_rating, verdict_of
from intactkv_eval.storage.documents import parse_json

NAME = "replies.jsonl"


class Line(BaseModel):
    """One reply, and to what. cost: USD, None where it was asked without prices. error: why there is no reply.

    references: the label of the reference answers beside. temperature: None where the judge takes none.
    """

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
    references: str | None = None
    temperature: float | None = 0.0
    cost: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    error: str | None = None

    @property
    def match(self) -> MatchKey:
        """What it is a reply to."""
        return MatchKey(self.key, self.models, self.choice)

    @model_validator(mode="after")
    def _check_verdict(self) -> "Line":
        """A rating from 0 to 10, or a winner: nothing else is a verdict, and a winner that nobody knows is no tie."""
        known = is_rating(self.verdict) if self.kind == "single" else self.verdict in WINNERS
        if self.verdict is not None and not known:
            raise ValueError(f"verdict {self.verdict}")
        return self


class Journal:
    """The replies of one folder: `lines` by what they reply to, the last of each; open for one process at a time."""

    def __init__(self, handle: IO[bytes], lines: Sequence[Line]) -> None:
        self._handle, self._all = handle, list(lines)
        self.lines = {line.match: line for line in lines if line.error is None}
        self.added = 0
        self._turn = threading.Lock()

    def spent(self, prices: Prices) -> float:
        """USD of all that was ever asked from this folder; what was asked without prices, at these."""
        return sum(prices.of(_tokens(line)) if line.cost is None else line.cost for line in self._all)

    def reply_to(self, key: MatchKey) -> Line | None:
        """The last reply to a match."""
        return self.lines.get(key)

    def has_verdict(self, key: MatchKey) -> bool:
        """Whether the last reply to a match holds one."""
        line = self.lines.get(key)
        return line is not None and line.verdict is not None

    def add(self, line: Line) -> None:
        """Keep a reply. When this returns it is on disk. Raises ConfigError where it cannot be written."""
        written = line.model_dump_json().encode() + b"\n"
        with self._turn:
            end = os.fstat(self._handle.fileno()).st_size
            try:
                kept = self._handle.write(written)
                if kept != len(written):  # as on a disk that fills up
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {kept} of {len(written)} bytes")
                os.fsync(self._handle.fileno())
            except OSError as error:
                os.ftruncate(self._handle.fileno(), end)  # half a line would spoil those behind it
                raise ConfigError(
                    f"{self._handle.name}: a reply cannot be written ({error.strerror}); make room and run again"
                ) from None
            self._all.append(line)
            if line.error is None:
                self.lines[line.match] = line
                self.added += 1


def _tokens(line: Line) -> tuple[int, int]:
    """As its server has counted, else the most that its texts can have: no token has less than a byte."""
    return line.tokens or (len(line.user_prompt.encode()), len(line.reply.encode()))


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


def read_lines(path: Path, content: bytes) -> list[Line]:
    """Whole lines. Raises DataError that names a damaged one."""
    found = []
    for number, text in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            row: Any = parse_json(text)
            line = Line.model_validate(row)
        except ValueError as error:  # pydantic's among them
            raise DataError(f"{path}, line {number}: no reply of a judge ({type(error).__name__})") from None
        if line.verdict is None and line.error is None:
            line = line.model_copy(update={"verdict": verdict_of(line.kind, line.reply)})
        found.append(line)
    return found
