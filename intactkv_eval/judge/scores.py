"""Scores: means over questions with their standard errors, by turn and category; wins and losses of pairs.

    score of a question = mean over its rated turns and choices;  score = mean over questions, se = sd / sqrt(n)

What has no rating is left out and counted. A pair is won where both orders say so, FastChat's own rule; all else is a
tie.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev
from typing import Any

from intactkv_eval.judge.fastchat import Judged
from intactkv_eval.report.tables import markdown_row

ALL = "all"
BIAS = "position bias"


@dataclass(frozen=True)
class Figure:
    """A mean over `questions`, its standard error (None for one question), and how many replies had no verdict."""

    value: float | None
    stderr: float | None
    questions: int
    unrated: int


def score_figures(judged: Judged) -> dict[str, Figure]:
    """`all`, `turn 1`, `turn 2`, then each category."""
    parts: dict[str, list[tuple[int, float | None]]] = defaultdict(list)
    for match, line in judged:
        rating = float(line.verdict) if line is not None and isinstance(line.verdict, int | float) else None
        for part in (ALL, f"turn {match.turn}", match.category):
            parts[part].append((match.question_id, rating))
    first = [ALL, *sorted(part for part in parts if part.startswith("turn "))]
    return {part: _figure(parts[part]) for part in [*first, *sorted(parts.keys() - set(first))]}


def whole_questions(judged: Judged) -> Judged:
    """What is left without the questions of which a reply has no rating."""
    lacking = {match.question_id for match, line in judged if line is None or line.verdict is None}
    return [(match, line) for match, line in judged if match.question_id not in lacking]


def by_question(judged: Judged) -> dict[int, dict[str, float]]:
    """Question -> `score`, `turn 1`, `turn 2`, as far as there are ratings."""
    found: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for match, line in judged:
        if line is not None and isinstance(line.verdict, int | float):
            for part in ("score", f"turn {match.turn}"):
                found[match.question_id][part].append(float(line.verdict))
    return {place: {part: mean(values) for part, values in parts.items()} for place, parts in found.items()}


def win_figures(rows: Iterable[Mapping[str, Any]]) -> dict[str, Figure]:
    """Of the first model against the second: the share of wins, a tie as half, overall, by turn and `position bias`.

    The last is the share of pairs whose two orders name different winners.
    """
    kept: dict[str, list[tuple[int, float | None]]] = defaultdict(list)
    for row in rows:
        both = (row["g1_winner"], row["g2_winner"])
        unrated = "error" in both
        won = {("model_1", "model_1"): 1.0, ("model_2", "model_2"): 0.0}.get(both, 0.5)
        for part in (ALL, f"turn {row['turn']}"):
            kept[part].append((row["question_id"], None if unrated else won))
        biased = float(set(both) == {"model_1", "model_2"})
        kept[BIAS].append((row["question_id"], None if unrated else biased))
    return {part: _figure(kept[part]) for part in sorted(kept, key=(ALL, "turn 1", "turn 2", BIAS).index)}


def _figure(values: Iterable[tuple[int, float | None]]) -> Figure:
    rated: dict[int, list[float]] = defaultdict(list)
    unrated = 0
    for question, value in values:
        if value is None:
            unrated += 1
        else:
            rated[question].append(value)
    means = [mean(of_one) for of_one in rated.values()]
    error = stdev(means) / sqrt(len(means)) if len(means) > 1 else None
    return Figure(mean(means) if means else None, error, len(means), unrated)


def table(figures: Mapping[str, Mapping[str, Figure]], heading: str) -> str:
    """Markdown: a row for each model, a column for each part."""
    parts = list(dict.fromkeys(part for row in figures.values() for part in row))
    lines = [[heading, *parts, "no verdict"], ["---"] + ["---:"] * (len(parts) + 1)]
    for name, row in figures.items():
        unrated = row[ALL].unrated if ALL in row else 0
        lines.append([name, *(_cell(row.get(part)) for part in parts), str(unrated)])
    return "\n".join(markdown_row(line) for line in lines)


def _cell(figure: Figure | None) -> str:
    if figure is None or figure.value is None:
        return ""
    error = "" if figure.stderr is None else f" ± {figure.stderr:.2f}"
    return f"{figure.value:.2f}{error}"


def seed_rows(
    figures: Mapping[str, Mapping[str, Figure]], same: Callable[[str], str | None]
) -> dict[str, dict[str, Figure]]:
    """A row for each group of runs that differ in their seed alone: the mean of their means and its standard error.

    same: a run's name -> its group's name, None for a run without a seed.
    """
    groups: dict[str, list[Mapping[str, Figure]]] = defaultdict(list)
    for name, row in figures.items():
        group = same(name)
        if group is not None:
            groups[group].append(row)
    found = {}
    for group, rows in groups.items():
        if len(rows) > 1:
            parts = [part for part in rows[0] if all(part in row for row in rows)]
            found[f"{group}, {len(rows)} seeds"] = {part: _spread([row[part] for row in rows]) for part in parts}
    return found


def _spread(figures: list[Figure]) -> Figure:
    values = [figure.value for figure in figures if figure.value is not None]
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else None
    return Figure(mean(values) if values else None, error, len(values), sum(figure.unrated for figure in figures))
