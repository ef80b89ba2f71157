"""Scores: FastChat's mean over judged rows and the mean over whole questions, with standard errors over questions.

    all               sum of all ratings / their number, a row for each turn and choice: FastChat's show_result
    whole questions   mean over the questions whose every turn and choice is rated, of the question's mean rating
    standard error    of a mean over rows of n questions, r rows, with deviations d_q = sum_q - mean * rows_q:
                      sqrt(n / (n - 1) * sum_q d_q^2) / r,  which is sd / sqrt(n) where all have as many rows

Of a set that is judged whole the first two are one number. What has no rating is left out and counted; how many of the
bench's questions are judged whole stands beside each figure.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from statistics import fmean

from intactkv_eval.judge.fastchat import Judged
from intactkv_eval.mt_bench.questions import Question
from intactkv_eval.report.significance import MIN_ERROR

ALL = "all"
WHOLE = "whole questions"
Rows = Iterable[tuple[int, float | None]]
"""(question, value); None where there is no verdict."""


@dataclass(frozen=True)
class Figure:
    """A mean and its standard error (None for fewer than MIN_ERROR questions).

    questions: that are judged whole, of: that the bench has. unrated: rows without a verdict. spread: standard
    deviation over seeds, where this is the mean of several.
    """

    value: float | None
    stderr: float | None
    questions: int
    of: int
    unrated: int
    spread: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of the bench's questions are judged, and whole."""
        return self.questions == self.of


@dataclass(frozen=True)
class Scores:
    """Of one model, by part (`all`, `whole questions`, `turn 1`, ..., each category): figures, and the mean rating of
    each question, as far as it is rated.
    """

    figures: Mapping[str, Figure]
    means: Mapping[str, Mapping[int, float]]


def figure_of(rows: Rows, expected: Mapping[int, int]) -> Figure:
    """The mean over rows. expected: how many rows each question of the bench should have."""
    rated, unrated = _by_question(rows)
    value, stderr = _mean_over_rows(rated)
    return Figure(value, stderr, len(_whole(rated, expected)), len(expected), unrated)


def scores_of(judged: Judged, questions: Iterable[Question]) -> Scores:
    """Of the judgments of one model. questions: of the bench."""
    parts: dict[str, list[tuple[int, float | None]]] = defaultdict(list)
    for match, line in judged:
        rating = float(line.verdict) if line is not None and isinstance(line.verdict, int | float) else None
        for part in (ALL, f"turn {match.turn}", match.category):
            parts[part].append((match.question_id, rating))
    expected = expected_rows(questions, choices_of(judged))
    turns = sorted(part for part in parts if part.startswith("turn "))
    listed = [*turns, *sorted(parts.keys() - {ALL, *turns})]
    figures = {part: figure_of(parts[part], expected[part]) for part in [ALL, *listed]}
    means = {part: _means(_by_question(parts[part])[0]) for part in [ALL, *listed]}
    means[WHOLE] = _means(_whole(_by_question(parts[ALL])[0], expected[ALL]))
    value, stderr = _mean_over_rows({question: [mean] for question, mean in means[WHOLE].items()})
    whole = replace(figures[ALL], value=value, stderr=stderr)
    return Scores({ALL: figures[ALL], WHOLE: whole, **{part: figures[part] for part in listed}}, means)


def _whole(rated: Mapping[int, list[float]], expected: Mapping[int, int]) -> dict[int, list[float]]:
    """The questions that are judged whole: a mean over what is left of another one would compare first turns with
    second ones.
    """
    return {question: values for question, values in rated.items() if len(values) >= expected.get(question, 1)}


def _means(rated: Mapping[int, Sequence[float]]) -> dict[int, float]:
    return {question: fmean(values) for question, values in sorted(rated.items())}


def expected_rows(questions: Iterable[Question], choices: int) -> dict[str, dict[int, int]]:
    """Part -> question -> the rows that it has where everything is answered and judged."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for question in questions:
        turns = len(question.turns)
        for part in (ALL, question.category):
            found[part][question.question_id] = choices * turns
        for turn in range(1, turns + 1):
            found[f"turn {turn}"][question.question_id] = choices
    return dict(found)


def choices_of(judged: Judged) -> int:
    """How many answers a question has; where they are not alike, the most that one has."""
    places = Counter(place for place, _ in {(match.question_id, match.choice) for match, _ in judged})
    return max(places.values(), default=1)


def _by_question(rows: Rows) -> tuple[dict[int, list[float]], int]:
    """The values by question, and how many rows have none."""
    rated: dict[int, list[float]] = defaultdict(list)
    unrated = 0
    for question, value in rows:
        if value is None:
            unrated += 1
        else:
            rated[question].append(value)
    return dict(rated), unrated


def _mean_over_rows(rated: Mapping[int, Sequence[float]]) -> tuple[float | None, float | None]:
    rows = sum(map(len, rated.values()))
    if not rows:
        return None, None
    mean = sum(sum(values) for values in rated.values()) / rows
    if len(rated) < MIN_ERROR:
        return mean, None
    squares = sum((sum(values) - mean * len(values)) ** 2 for values in rated.values())
    return mean, sqrt(len(rated) / (len(rated) - 1) * squares) / rows
