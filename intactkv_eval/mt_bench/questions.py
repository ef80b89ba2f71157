"""Questions, reference answers and the judge's prompts, as typed values.

Temperatures by category are FastChat's; NEEDS_REFERENCE names the categories that are judged beside a reference.
"""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from intactkv_eval.errors import DataError
from intactkv_eval.mt_bench.sources import PROMPTS, QUESTIONS, bench_file
from intactkv_eval.storage.files import read_jsonl

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7
NEEDS_REFERENCE = ("math", "reasoning", "coding")
Row = TypeVar("Row", bound=BaseModel)


class Question(BaseModel):
    """turns: what the user says, each behind the answers to those before it."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    question_id: int
    category: str
    turns: tuple[str, ...] = Field(min_length=1)
    reference: tuple[str, ...] = ()

    @property
    def temperature(self) -> float:
        """Of its category."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


class Prompt(BaseModel):
    """One of the judge's prompts. kind: single or pairwise. output_format: [[rating]] or [[A]]."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    name: str
    kind: str = Field(alias="type")
    system_prompt: str
    prompt_template: str
    output_format: str


class Questions(NamedTuple):
    """digest: SHA-256 of the file."""

    questions: tuple[Question, ...]
    digest: str


def load_questions(bench: str, folder: str | Path | None = None) -> Questions:
    """All questions of a bench. Raises DataError where a line is no question, a turn is empty, or an id comes twice."""
    path = bench_file(bench, QUESTIONS, folder)
    found = read_rows(path, Question)
    empty = next((one.question_id for one in found if not all(turn.strip() for turn in one.turns)), None)
    if empty is not None:
        raise DataError(f"{path}: question {empty} has an empty turn")
    twice = sorted(key for key, times in Counter(one.question_id for one in found).items() if times > 1)
    if twice or not found:
        raise DataError(f"{path}: question ids that come twice: {twice}" if twice else f"{path}: no question")
    return Questions(tuple(found), hashlib.sha256(path.read_bytes()).hexdigest())


def load_prompts(bench: str, folder: str | Path | None = None) -> dict[str, Prompt]:
    """The judge's prompts by name. Raises DataError for a damaged file."""
    return {prompt.name: prompt for prompt in read_rows(bench_file(bench, PROMPTS, folder), Prompt)}


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """The lines of a JSONL file as values. Raises DataError that names the line which is none."""
    rows = []
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            rows.append(kind.model_validate(row))
        except ValidationError as error:
            first: Any = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise DataError(f"{path}, line {number}: {place or 'the line'}: {first['msg']}") from None
    return rows
