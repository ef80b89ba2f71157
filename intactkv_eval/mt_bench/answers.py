"""Answers in FastChat's layout, so that its judge reads ours and ours reads its:

model_answer/<model id>.jsonl, one question a line:
{"question_id", "answer_id", "model_id", "choices": [{"index", "turns": [answer, ...]}], "tstamp"}
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from intactkv_eval.errors import DataError
from intactkv_eval.mt_bench.questions import read_rows
from intactkv_eval.storage.files import write_jsonl


class Choice(BaseModel):
    """One whole conversation's answers."""

    model_config = ConfigDict(frozen=True, extra="allow")
    index: int
    turns: tuple[str, ...]


class Answer(BaseModel):
    """All choices to one question."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())
    question_id: int
    answer_id: str
    model_id: str
    choices: tuple[Choice, ...] = Field(min_length=1)
    tstamp: float


def answer_id(model_id: str, question_id: int, choices: Sequence[Choice]) -> str:
    """22 letters as FastChat's own ids have, but of the content: the same answers have the same id."""
    content = json.dumps([model_id, question_id, [choice.turns for choice in choices]])
    return hashlib.sha256(content.encode()).hexdigest()[:22]


def read_answers(path: Path) -> dict[int, Answer]:
    """The answers of a file by question, the last of several. Raises DataError for a line that is no answer."""
    if not path.is_file():
        raise DataError(f"{path}: no such answer file")
    return {answer.question_id: answer for answer in read_rows(path, Answer)}


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write a whole file, sorted by question."""
    rows = sorted(answers, key=lambda answer: answer.question_id)
    write_jsonl(path, (row.model_dump(mode="json") for row in rows))
