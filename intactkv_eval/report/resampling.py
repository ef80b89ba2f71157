"""Resampling of the units of a measurement: documents, clusters of documents, or blocks of neighbouring windows.

A measurement is a weighted sum of the means of several strata (the tasks of a group; one stratum for a single task):

    m = sum over strata t of w_t * (sum of the values of t) / (number of documents of t)

Each stratum is resampled by itself, unit by unit with replacement. Its units are

    documents   every document alone
    clusters    all documents of one passage, context or conversation together
    blocks      L neighbouring windows together: the moving-block bootstrap (Kuensch, Annals of Statistics 1989)

L = ceil(1.5 n^(1/3)) of n windows. A studentized resample is (m* - E*[m*]) / se*, and its distribution stands for that
of (m - true) / se (bootstrap-t: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5). Knows no
runs and no tables.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, exp, log

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
RESAMPLES = 9999
_NUMBERS = 2**22  # at most so many are drawn at once
_ALIKE = 256  # units of at most so many kinds are drawn by their kinds' counts
_WORK = 2 * 10**7  # picks of all resamples: with very many units fewer resamples are enough
_FEWEST = 999


def block_length(windows: int) -> int:
    """L, the number of neighbouring windows that are resampled together."""
    return max(1, ceil(1.5 * exp(log(windows) / 3)))


@dataclass(frozen=True)
class Stratum:
    """One task's units, ready to be resampled.

    units: how many there are; of windows, the windows. weight: w_t. sums: [U, K], the K values of each unit (each
    block, where neighbours stay together) summed over its documents. counts: [U], its documents. drawn: units in a
    resample. mean: [K], of all documents. covariance: [K, K], of that mean. degrees: of freedom of it.
    """

    units: int
    weight: float
    sums: Array
    counts: Array
    drawn: int
    mean: Array
    covariance: Array
    degrees: float


def of_units(weight: float, values: Array, labels: Sequence[object] | None = None) -> Stratum:
    """A stratum of documents, or of the clusters that `labels` name.

    values: [n, K]. labels: the cluster of each document, None where each is one by itself. At least two units.
    """
    if labels is None:
        sums, counts = values, np.ones(len(values))
    else:
        places: dict[object, int] = {}
        unit = np.array([places.setdefault(label, len(places)) for label in labels])
        sums = np.stack([np.bincount(unit, column) for column in values.T], axis=1)
        counts = np.bincount(unit).astype(np.float64)
    total = counts.sum()
    mean = sums.sum(axis=0) / total
    rest = sums - counts[:, None] * mean
    units = len(sums)
    covariance = rest.T @ rest * (units / (units - 1)) / total**2
    return Stratum(units, weight, sums, counts, units, mean, covariance, units - 1)


def of_windows(weight: float, values: Array) -> Stratum:
    """A stratum of windows that follow each other in one text. values: [n, K], in the order of the text, n at least 2.

    The variance of the mean is that of all blocks of L neighbours, times 1 / (1 - L / n) since they are measured from
    the sample's mean.
    """
    n = len(values)
    length = min(block_length(n), n // 2)
    total = np.vstack([np.zeros((1, values.shape[1])), np.cumsum(values - values.mean(axis=0), axis=0)])
    sums = total[length:] - total[:-length] + length * values.mean(axis=0)
    drawn = ceil(n / length)
    mean = values.mean(axis=0)
    rest = sums / length - mean
    covariance = rest.T @ rest / len(rest) * length / n / (1 - length / n)
    return Stratum(n, weight, sums, np.full(len(sums), float(length)), drawn, mean, covariance, drawn - 1)


@dataclass(frozen=True)
class Measured:
    """The weighted mean of all strata: mean [K], its covariance [K, K], and the degrees of freedom of that."""

    mean: Array
    covariance: Array
    degrees: float


def measured(strata: Sequence[Stratum]) -> Measured:
    """Of the sample itself. Degrees of freedom by Welch and Satterthwaite, of the first value."""
    mean = np.sum([one.weight * one.mean for one in strata], axis=0)
    parts = [one.weight**2 * one.covariance for one in strata]
    variances = np.array([part[0, 0] for part in parts])
    scale = variances.max()
    if scale == 0:
        degrees = float(sum(one.degrees for one in strata))
    else:
        shares = variances / scale
        degrees = float(shares.sum() ** 2 / np.sum(shares**2 / [one.degrees for one in strata]))
    return Measured(mean, np.sum(parts, axis=0), degrees)


@dataclass(frozen=True)
class Resampled:
    """R resamples: how far their means are from the mean over all resamples [R, K], and their covariances [R, K, K]."""

    changes: Array
    covariances: Array

    def studentized(self, direction: Array) -> Array:
        """|change| / standard error of each resample along a direction [K]; infinite where there is no spread.

        A resample without spread is infinitely far off unless it is not off at all: a few documents that differ among
        many ties must not look certain.
        """
        change = np.abs(self.changes @ direction)
        both = np.outer(direction, direction).ravel()
        variance = np.maximum(self.covariances.reshape(len(change), -1) @ both, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes: Array = np.where(change == 0, 0.0, change / np.sqrt(variance))
        return sizes


def resampled(strata: Sequence[Stratum], resamples: int = RESAMPLES) -> Resampled:
    """The same resamples in every call: drawing begins from one seed."""
    units = sum(one.drawn for one in strata)
    count = max(min(resamples, _FEWEST), min(resamples, _WORK // units))
    width = strata[0].sums.shape[1]
    changes, covariances = np.zeros((count, width)), np.zeros((count, width, width))
    for number, one in enumerate(strata):
        start = 0
        for change, covariance in _draws(one, count, np.random.default_rng(number)):
            rows = slice(start, start + len(change))
            changes[rows] += one.weight * change
            covariances[rows] += one.weight**2 * covariance
            start += len(change)
    return Resampled(changes, covariances)


def _draws(one: Stratum, count: int, random: np.random.Generator) -> Iterator[tuple[Array, Array]]:
    """Changes [r, K] and covariances [r, K, K] of a stratum's mean, r resamples at a time."""
    center = one.sums.sum(axis=0) / one.counts.sum()
    rest = one.sums - one.counts[:, None] * center  # [U, K], what is left of each unit
    table = np.column_stack([rest, one.counts])
    kinds, times = np.unique(table, axis=0, return_counts=True)
    few = len(kinds) <= _ALIKE and len(kinds) * 2 <= len(table)
    rest, counts = (kinds[:, :-1], kinds[:, -1]) if few else (rest, one.counts)
    squares = rest[:, :, None] * rest[:, None, :]
    rows = max(1, _NUMBERS // (len(rest) + one.drawn))
    for start in range(0, count, rows):
        size = min(rows, count - start)
        if few:
            chosen = random.multinomial(one.drawn, times / len(table), size).astype(np.float64)
        else:
            chosen = _counted(random.integers(0, len(rest), (size, one.drawn)), len(rest))
        total = chosen @ counts
        change = chosen @ rest / total[:, None]
        seconds = np.einsum("ru,ukl->rkl", chosen, squares, optimize=True)
        cross = chosen @ (rest * counts[:, None])
        second = chosen @ counts**2
        # sum over the drawn units of (rest - counts * change)(rest - counts * change)'
        spread = (
            seconds
            - change[:, :, None] * cross[:, None, :]
            - cross[:, :, None] * change[:, None, :]
            + second[:, None, None] * change[:, :, None] * change[:, None, :]
        )
        yield change, spread * (one.drawn / (one.drawn - 1)) / (total**2)[:, None, None]


def _counted(picks: NDArray[np.int64], units: int) -> Array:
    """How often each unit was picked: [r, units] of picks [r, drawn]."""
    places = picks + units * np.arange(len(picks))[:, None]
    return np.bincount(places.ravel(), minlength=units * len(picks)).reshape(len(picks), units).astype(np.float64)
