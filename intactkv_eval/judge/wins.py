"""Pairs: wins, ties and losses of a model, and the share that it wins.

A pair is two requests, one in each order. FastChat's rule: a win where both orders name this model, a loss where both
name the other, else a tie; a pair that lacks a verdict is left out and counted. Win rate: (wins + ties / 2) / pairs,
FastChat's `win_rate_adjusted`. Position bias: the share of pairs whose two orders name different winners.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from intactkv_eval.judge.scores import ALL, Figure, expected_rows, figure_of
from intactkv_eval.mt_bench.questions import Question

BIAS = "position bias"
_ERROR = "error"
_OTHER = {"model_1": "model_2", "model_2": "model_1"}


@dataclass(frozen=True)
class Wins:
    """Of one model: counts of pairs, and the share that it wins by part (`all`, `turn 1`, ..., `position bias`)."""

    won: int
    tied: int
    lost: int
    figures: Mapping[str, Figure]


def wins_of(model: str, rows: Sequence[Mapping[str, Any]], questions: Iterable[Question]) -> Wins:
    """Of the judgments in FastChat's layout those that `model` is in. questions: of the bench."""
    own = [row for row in rows if model in {row["model_1"], row["model_2"]}]
    kept: dict[str, list[tuple[int, float | None]]] = defaultdict(list)
    counts: Counter[float] = Counter()
    for row in own:
        share, biased = _share(row, "model_1" if row["model_1"] == model else "model_2")
        if share is not None:
            counts[share] += 1
        for part in (ALL, f"turn {row['turn']}"):
            kept[part].append((row["question_id"], share))
        kept[BIAS].append((row["question_id"], biased))
    expected = expected_rows(questions, _pairs_of_a_turn(own))
    expected[BIAS] = expected[ALL]
    parts = [ALL, *sorted(part for part in kept if part.startswith("turn ")), BIAS]
    figures = {part: figure_of(kept[part], expected[part]) for part in parts}
    return Wins(counts[1.0], counts[0.5], counts[0.0], figures)


def _share(row: Mapping[str, Any], own: str) -> tuple[float | None, float | None]:
    """1, 1/2 or 0 for a win, a tie or a loss, and 1 where the two orders contradict; None without both verdicts."""
    both = (row["g1_winner"], row["g2_winner"])
    if _ERROR in both:
        return None, None
    won = {(own, own): 1.0, (_OTHER[own], _OTHER[own]): 0.0}.get(both, 0.5)
    return won, float(set(both) == {"model_1", "model_2"})


def _pairs_of_a_turn(rows: Iterable[Mapping[str, Any]]) -> int:
    """Opponents times choices: the most that a turn of a question has."""
    return max(Counter((row["question_id"], row["turn"]) for row in rows).values(), default=1)
