"""Runs that differ in their seed alone, as one row: averaged as the report averages them, by its own function.

A question's value is its mean over seeds, the ± the standard error of these over questions, the spread the standard
deviation of the seeds' figures.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from intactkv_eval.judge.entries import AnswerSet
from intactkv_eval.judge.scores import Figure, Scores
from intactkv_eval.report.score import Score
from intactkv_eval.report.seeds import seeds_merged


def seed_rows(entries: Sequence[AnswerSet], scores: Mapping[str, Scores]) -> dict[str, dict[str, Figure]]:
    """A row for each group of several seeds. scores: of each entry."""
    groups: dict[str, list[AnswerSet]] = defaultdict(list)
    for entry in entries:
        if entry.group is not None and entry.seed is not None:
            groups[entry.group].append(entry)
    names = _names(list(groups))
    found = {}
    for group, alike in groups.items():
        if len(alike) > 1:
            rows = [scores[entry.name] for entry in alike]
            found[f"{names[group]}, {len(alike)} seeds"] = {
                part: _figure(score, [row.figures[part] for row in rows])
                for part, score in _merged(alike, rows).items()
            }
    return found


def _merged(entries: Sequence[AnswerSet], rows: Sequence[Scores]) -> dict[str, Score]:
    """Part -> the score of all seeds, of the parts that every one has a figure of."""
    parts = [part for part in rows[0].figures if all(_has(row.figures.get(part)) for row in rows)]
    first = entries[0].run
    assert first is not None  # what has a seed is a run
    runs = []
    for place, (entry, row) in enumerate(zip(entries, rows, strict=True)):
        scores = {part: _score(part, row, entry.seed) for part in parts}
        runs.append(replace(first, scores=scores, date=float(place)))
    found = {name: score for run in seeds_merged(runs) for name, score in run.scores.items()}
    return {part: found[part] for part in parts}


def _has(figure: Figure | None) -> bool:
    return figure is not None and figure.value is not None


def _score(part: str, row: Scores, seed: object) -> Score:
    figure = row.figures[part]
    values = {(part, question): mean for question, mean in row.means[part].items()}
    return Score(part, "score", figure.value or 0.0, figure.stderr, True, {"seed": seed}, values)


def _figure(score: Score, seeds: Sequence[Figure]) -> Figure:
    """Whole are the questions that every seed has whole, at most."""
    return Figure(
        score.value,
        score.stderr,
        min(one.questions for one in seeds),
        seeds[0].of,
        sum(one.unrated for one in seeds),
        score.spread,
    )


def _names(groups: Sequence[str]) -> dict[str, str]:
    """Group -> its name; with the mark of what tells two groups of one name apart where there are such."""
    short = {group: group.partition(" [")[0] for group in groups}
    return {group: name if list(short.values()).count(name) == 1 else group for group, name in short.items()}
