"""What the judge is asked: one answer to grade, or two to choose from, as messages of the published prompts.

    single     prompt(question, answer)                            -> [[rating]], 1 to 10
    pairwise   prompt(question, answer A, answer B), both orders   -> [[A]], [[B]] or [[C]] for a tie

The first turn is judged alone, the second as a whole conversation; math, reasoning and coding beside a reference.
Source: FastChat's llm_judge and its judge_prompts.jsonl.
"""

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from intactkv_eval.errors import DataError
from intactkv_eval.judge.references import References
from intactkv_eval.mt_bench.answers import Answer, Choice
from intactkv_eval.mt_bench.questions import NEEDS_REFERENCE, Prompt, Question

MOST_TURNS = 2


class MatchKey(NamedTuple):
    """What a reply is known by. request: SHA-256 of all that the judge is sent, and where; then whose answers it is on.

    Equal answers of two models, seeds or choices are requests of their own, as FastChat asks for each: one verdict for
    all of them would leave the judge's own noise out of their mean.
    """

    request: str
    models: tuple[str, ...]
    choice: int


@dataclass(frozen=True)
class Match:
    """One request to the judge. models: that of the answer, or of A and B. choice: which of a model's answers.

    messages: (role, content). prompt: its name. kind: single or pairwise. turn: from 1. references: the label of the
    reference answers that one of them stands beside, None without.
    """

    question_id: int
    category: str
    turn: int
    choice: int
    models: tuple[str, ...]
    prompt: str
    kind: str
    messages: tuple[tuple[str, str], ...]
    references: str | None = None

    def key(self, judge: str, server: str | None, max_tokens: int) -> MatchKey:
        """A reply is kept for as long as nothing of it changes."""
        sent = json.dumps([judge, server, max_tokens, self.messages])
        return MatchKey(hashlib.sha256(sent.encode()).hexdigest(), self.models, self.choice)


@dataclass(frozen=True)
class Bench:
    """Questions by id, the judge's prompts by name, and reference answers."""

    questions: Mapping[int, Question]
    prompts: Mapping[str, Prompt]
    references: References


def single_matches(bench: Bench, answers: Mapping[int, Answer]) -> Iterator[Match]:
    """Every turn of every choice of one model. Raises DataError for an answer that does not fit its question."""
    for question_id in sorted(answers):
        question, answer = _question(bench, question_id), answers[question_id]
        for choice in answer.choices:
            _check(question, answer, choice)
            for turn in range(1, len(question.turns) + 1):
                yield _match(bench, question, turn, "single", (answer,), (choice,))


def pairwise_matches(bench: Bench, one: Mapping[int, Answer], other: Mapping[int, Answer]) -> Iterator[Match]:
    """Every turn of the choices that both models have, in both orders, the questions that both have answered.

    Raises DataError where there is none.
    """
    shared = sorted(one.keys() & other.keys())
    if not shared:
        raise DataError("the two models have answered no question in common; judge answers to one bench")
    for question_id in shared:
        question, pair = _question(bench, question_id), (one[question_id], other[question_id])
        for choices in zip(pair[0].choices, pair[1].choices, strict=False):
            for answer, choice in zip(pair, choices, strict=True):
                _check(question, answer, choice)
            for turn in range(1, len(question.turns) + 1):
                yield _match(bench, question, turn, "pairwise", pair, choices)
                yield _match(bench, question, turn, "pairwise", pair[::-1], choices[::-1])


def _question(bench: Bench, question_id: int) -> Question:
    question = bench.questions.get(question_id)
    if question is None:
        raise DataError(f"question {question_id} is not of this bench; name the right one with --bench")
    if len(question.turns) > MOST_TURNS:
        raise DataError(f"question {question_id} has {len(question.turns)} turns; the judge's prompts know two")
    return question


def _check(question: Question, answer: Answer, choice: Choice) -> None:
    if len(choice.turns) != len(question.turns):
        raise DataError(
            f"{answer.model_id}, question {question.question_id}: {len(choice.turns)} answers to "
            f"{len(question.turns)} turns; answer it again"
        )


def _match(
    bench: Bench, question: Question, turn: int, kind: str, answers: Sequence[Answer], choices: Sequence[Choice]
) -> Match:
    beside = question.category in NEEDS_REFERENCE
    prompt = _prompt(bench, kind, beside, turn)
    filled = _fields(question, choices)
    if beside:
        turns = bench.references.turns(question, turn)
        filled |= {f"ref_answer_{i}": text for i, text in enumerate(turns, start=1)}
    return Match(
        question_id=question.question_id,
        category=question.category,
        turn=turn,
        choice=choices[0].index,
        models=tuple(answer.model_id for answer in answers),
        prompt=prompt.name,
        kind=kind,
        messages=(("system", prompt.system_prompt), ("user", _filled(prompt, filled))),
        references=bench.references.label if beside else None,
    )


def _prompt(bench: Bench, kind: str, beside: bool, turn: int) -> Prompt:
    name = {"single": "single", "pairwise": "pair"}[kind]
    version = "-math-v1" if beside else {"single": "-v1", "pairwise": "-v2"}[kind]
    wanted = name + version + ("-multi-turn" if turn > 1 else "")
    if wanted not in bench.prompts:
        raise DataError(f"the judge's prompts lack {wanted!r}; there are {', '.join(sorted(bench.prompts))}")
    return bench.prompts[wanted]


def _fields(question: Question, choices: Sequence[Choice]) -> dict[str, str]:
    """The names of FastChat's templates: `question` and `answer` are of the first turn."""
    found = {"question": question.turns[0]}
    found |= {f"question_{i}": text for i, text in enumerate(question.turns, start=1)}
    for letter, choice in zip(("",) if len(choices) == 1 else ("_a", "_b"), choices, strict=True):
        found[f"answer{letter}"] = choice.turns[0]
        found |= {f"answer{letter}_{i}": text for i, text in enumerate(choice.turns, start=1)}
    return found


def _filled(prompt: Prompt, fields: Mapping[str, str]) -> str:
    """Plain names alone are filled in: an answer with braces stays what it is, a template cannot reach attributes."""
    made = []
    try:
        parsed = list(string.Formatter().parse(prompt.prompt_template))
    except ValueError as error:
        raise DataError(
            f"the judge's prompt {prompt.name!r} is no template ({error}): write {{{{ for a brace"
        ) from None
    for text, name, specification, conversion in parsed:
        made.append(text)
        if name is None:
            continue
        if name not in fields or specification or conversion:
            raise DataError(f"the judge's prompt {prompt.name!r} asks for {name!r}; known are {', '.join(fields)}")
        made.append(fields[name])
    return "".join(made)
