"""From scores to tests: which units of two runs are resampled together, and what is tested of them.

    perplexity by windows   moving blocks of neighbouring windows; tested on the negative log-likelihood
    other tasks             documents, or the clusters that clusters.py finds
    groups of tasks         each task is a stratum with its weight; those of few units are resampled as one

Knows no cells and no tables.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from intactkv_eval.report.resampling import RESAMPLES, Array, Stratum, block_length, measured, of_units, of_windows
from intactkv_eval.report.score import Document, Score, finite
from intactkv_eval.report.share import Share, share_of
from intactkv_eval.report.significance import MIN_ERROR, Test, accuracy_test, difference_test


def standard_error(score: Score) -> float | None:
    """Of the mean of a score's values (of its negative log-likelihood, where it is a perplexity).

    None for fewer than MIN_ERROR units, and where no values were logged.
    """
    strata = _strata(score, [score.values])
    if strata is None or sum(one.units for one in strata) < MIN_ERROR:
        return None
    return float(np.sqrt(max(measured(strata).covariance[0, 0], 0.0)))


def with_own_error(score: Score) -> Score:
    """The score with the standard error of its own values: that of lm_eval takes all documents for independent.

    Without logged values it stays lm_eval's.
    """
    if not score.values:
        return score
    error = standard_error(score)
    return replace(score, stderr=None if error is None else finite(error * (score.value if score.of_nll else 1.0)))


def unit_of(score: Score) -> str:
    """What is resampled of a score, for a table's notes; empty where no values were logged."""
    count = len(score.values)
    if not count:
        return ""
    if score.of_nll:
        return f"blocks of {block_length(count)} neighbouring windows, of {count}"
    clusters = len({score.clusters.get(place, place) for place in score.values})
    if clusters < count:
        return f"{clusters} clusters of one {score.cluster_field}, of {count} documents"
    return f"{count} documents"


def is_paired(scores: Sequence[Score]) -> bool:
    """Whether all have logged the same documents, weighted alike."""
    first = scores[0]
    return bool(first.values) and all(
        score.values.keys() == first.values.keys() and score.weights == first.weights for score in scores
    )


def paired_test(one: Score, other: Score, resamples: int = RESAMPLES) -> Test | None:
    """The paired test of one - other; None where they share no documents, or too few for a standard error."""
    if not is_paired([one, other]):
        return None
    change = {place: one.values[place] - other.values[place] for place in one.values}
    if not one.of_nll and not one.weights and not _is_clustered(one):
        values = np.array([[score.values[place] for place in sorted(score.values)] for score in (one, other)])
        if np.isin(values, (0.0, 1.0)).all():
            return accuracy_test(values[0], values[1])
    strata = _strata(one, [change])
    return None if strata is None else difference_test(strata, _name(one), resamples)


def share_between(intact: Score, baseline: Score, full: Score, resamples: int = RESAMPLES) -> Share | None:
    """The share of baseline - full that baseline - intact is; None where they share no documents, or too few."""
    if not is_paired([intact, baseline, full]):
        return None
    given = {place: baseline.values[place] - intact.values[place] for place in intact.values}
    lost = {place: baseline.values[place] - full.values[place] for place in intact.values}
    strata = _strata(intact, [given, lost])
    return None if strata is None else share_of(strata, resamples)


def _name(score: Score) -> str:
    if score.of_nll:
        return "moving-block bootstrap-t of the log-likelihood"
    of = "clusters" if _is_clustered(score) else "documents"
    return f"bootstrap-t over {of}" + (", by task" if score.weights else "")


def _is_clustered(score: Score) -> bool:
    return len({score.clusters.get(place, place) for place in score.values}) < len(score.values)


def _strata(score: Score, columns: Sequence[Mapping[Document, float]]) -> list[Stratum] | None:
    """The strata of values by document; None where there are none, or one of them is no number."""
    places = sorted(score.values)
    values = np.array([[column[place] for column in columns] for place in places])
    units = {score.clusters.get(place, place) for place in places}
    if len(units) < 2 or not np.isfinite(values).all():
        return None
    if score.of_nll and not score.weights:
        return _windows(places, values)
    if not score.weights:
        return [of_units(1.0, values, [score.clusters.get(place, place) for place in places])]
    return _weighted(score, places, values)


def _windows(places: Sequence[Document], values: Array) -> list[Stratum]:
    """One stratum for each text: windows of two texts are no neighbours."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, (task, _) in enumerate(places):
        rows[task].append(row)
    if min(map(len, rows.values())) < 2:
        return [of_units(1.0, values)]
    return [of_windows(len(part) / len(places), values[part]) for part in rows.values()]


def _weighted(score: Score, places: Sequence[Document], values: Array) -> list[Stratum]:
    """A stratum for each task; tasks of fewer than MIN_ERROR units are one together, each document with its weight."""
    rows: dict[str, list[int]] = defaultdict(list)
    units: dict[str, set[object]] = defaultdict(set)
    for row, place in enumerate(places):
        rows[place[0]].append(row)
        units[place[0]].add(score.clusters.get(place, place))
    large = sorted((task for task in rows if len(units[task]) >= MIN_ERROR), key=lambda task: len(units[task]))
    labels = [score.clusters.get(place, place) for place in places]
    small = [row for task in rows if task not in large for row in rows[task]]
    if small and len({labels[row] for row in small}) < 2 and large:
        small += rows[large.pop(0)]
    strata = [of_units(score.weights[task], values[rows[task]], [labels[row] for row in rows[task]]) for task in large]
    if small:
        scales = [score.weights[places[row][0]] / len(rows[places[row][0]]) * len(small) for row in small]
        together = values[small] * np.array(scales)[:, None]
        strata.append(of_units(1.0, together, [labels[row] for row in small]))
    return strata
