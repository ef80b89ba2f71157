"""Whose reference answers stand beside an answer that is judged: those of the judge's own name, or others by name.

FastChat takes `reference_answer/<judge>.jsonl`, so that gpt-4-0125-preview, which IntactKV's tables were judged by, has
other references than gpt-4: 60 of MT-Bench's 160 requests differ.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from intactkv_eval.data.hub import mirror
from intactkv_eval.errors import DataError
from intactkv_eval.mt_bench.answers import Answer, read_answers
from intactkv_eval.mt_bench.questions import NEEDS_REFERENCE, Question
from intactkv_eval.mt_bench.sources import REFERENCES, bench_file, reference_sets

_LETTERS = 12  # of a digest that people read


@dataclass(frozen=True)
class References:
    """Reference answers by question. name: whose they are, None where no question needs one. digest: of their file."""

    name: str | None = None
    path: Path | None = None
    digest: str = ""
    answers: Mapping[int, Answer] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        """The name, and which file of that name: what two runs must have in common to be compared."""
        return None if self.name is None else f"{self.name} (sha256 {self.digest[:_LETTERS]})"

    def turns(self, question: Question, turn: int) -> tuple[str, ...]:
        """The reference answers to a question, at least to its first `turn` turns. Raises DataError without them."""
        answer = self.answers.get(question.question_id)
        turns = answer.choices[0].turns if answer else ()
        if len(turns) < turn:
            raise DataError(
                f"{self.path}: no reference answer to turn {turn} of question {question.question_id} "
                f"({question.category}); add it, or name other references (--references)"
            )
        return turns


def load_references(
    judge: str, name: str | None, bench: str, folder: Path | None, questions: Iterable[Question]
) -> References:
    """The references for `questions`, called `name`, by default the judge's own; none where no question needs one.

    Raises DataError where there are none of that name: it lists those that there are.
    """
    needed = any(question.category in NEEDS_REFERENCE for question in questions)
    if not needed and name is None:
        return References()
    wanted = name or judge
    sets = reference_sets(bench, folder)
    if wanted not in sets:
        why = f"--references {name}" if name else f"the judge {judge!r} has no reference answers of its own name"
        place = folder or mirror() or f"the published {bench}"
        others = f"name one of {', '.join(sets)} (--references NAME), or " if sets else ""
        raise DataError(
            f"{why}: {place} holds no {REFERENCES}/{wanted}.jsonl; {others}add that file to a folder (--questions)"
        )
    path = bench_file(bench, f"{REFERENCES}/{wanted}.jsonl", folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return References(wanted, path, digest, read_answers(path)) if needed else References()
