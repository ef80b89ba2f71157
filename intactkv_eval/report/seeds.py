"""Runs that differ in their seed alone, as one: a document's value is its mean over seeds, the figure theirs.

Paired with a baseline of the same seeds; against one of other seeds nothing is compared, and the report says so.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import nan
from statistics import fmean, stdev

from intactkv_eval.report.collect import Identity, Run
from intactkv_eval.report.pairing import with_own_error
from intactkv_eval.report.score import Score

_LARGEST = 1e150  # of a figure whose square is a number
Key = tuple[Identity, tuple[int, ...], str | None, tuple[str, str, str]]


def seeds_merged(runs: Sequence[Run]) -> list[Run]:
    """The runs, oldest first; of each measurement that was run with several seeds one run more, and those no more."""
    groups: dict[Key, dict[str, tuple[Run, Score]]] = defaultdict(dict)
    for run in runs:
        for score in run.scores.values():
            if score.settings.get("seed") is not None:
                key = (run.identity, run.pivot_tokens, run.rows, _without_seed(score).column)
                groups[key][str(score.settings["seed"])] = (run, score)  # the newest counts
    several = {key: found for key, found in groups.items() if len(found) > 1}
    merged = [_merged(found) for found in several.values()]
    gone: dict[tuple[Identity, tuple[int, ...], str | None], set[tuple[str, str, str]]] = defaultdict(set)
    for identity, tokens, rows, column in several:
        gone[identity, tokens, rows].add(column)
    kept = [_without(run, gone.get((run.identity, run.pivot_tokens, run.rows), set())) for run in runs]
    return sorted([*(run for run in kept if run.scores), *merged], key=lambda run: (run.date, str(run.path)))


def _without_seed(score: Score) -> Score:
    return replace(score, settings={key: value for key, value in score.settings.items() if key != "seed"})


def _without(run: Run, columns: set[tuple[str, str, str]]) -> Run:
    if not columns:
        return run
    scores = {task: score for task, score in run.scores.items() if _without_seed(score).column not in columns}
    return replace(run, scores=scores)


def _merged(found: dict[str, tuple[Run, Score]]) -> Run:
    seeds = sorted(found, key=lambda seed: (len(seed), seed))
    runs, scores = zip(*(found[seed] for seed in seeds), strict=True)
    newest, first = max(runs, key=lambda run: run.date), scores[0]
    alike = all(score.values.keys() == first.values.keys() and score.documents == first.documents for score in scores)
    values = {place: _mean([score.values[place] for score in scores]) for place in first.values} if alike else {}
    figures = [score.value for score in scores]
    one: Score = replace(
        first,
        value=_mean(figures),
        stderr=None,
        settings={**first.settings, "seed": ", ".join(seeds)},
        values=values,
        documents=first.documents if alike else None,
        spread=_deviation(figures),
    )
    merged: Run = replace(newest, scores={first.task: with_own_error(one)})
    return merged


def _mean(figures: list[float]) -> float:
    return fmean(figures) if all(abs(one) < _LARGEST for one in figures) else nan


def _deviation(figures: list[float]) -> float:
    """NaN where the figures of a file are none, or too large to be added up."""
    return stdev(figures) if all(abs(one) < _LARGEST for one in figures) else nan
