"""Is a difference real? Tests and intervals over documents that two runs share.

    means, perplexities   paired bootstrap-t:  delta ± q * se,  q the 95% quantile of |delta* - delta| / se*
                          delta = g(mean a) - g(mean b), g the identity, or exp of a mean negative log-likelihood
    accuracies            p: exact McNemar test (the sign test of the documents that differ);
                          interval: Bonett and Price, Statistical Methods 2012, for paired proportions
    several in a table    Holm's correction

    groups of tasks       normal; where few documents differ, all signs of their differences

Every number is the same in every run: resampling begins from one seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
LEAST = 8  # documents: below, nothing is called
RESAMPLES = 9999
_AT_ONCE = 2**22  # numbers
_FEW = 16  # documents that differ, of all tasks of a group
_Z = NormalDist().inv_cdf(1 - LEVEL / 2)
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Test:
    """A paired difference: its 95% interval, the chance of one as large where there is none, and what found it.

    low, high, p: None where there are fewer than LEAST documents.
    """

    __test__ = False  # not pytest's

    value: float
    stderr: float
    low: float | None
    high: float | None
    p: float | None
    documents: int
    method: str


def paired_difference(
    one: Sequence[float], other: Sequence[float], of_nll: bool = False, resamples: int = RESAMPLES
) -> Test | None:
    """The difference of two runs on the same documents, in their order; None for fewer than two."""
    first, second = np.asarray(one, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if len(first) < 2 or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    if len(first) < LEAST:
        value, stderr = _delta(first[None], second[None], of_nll)
        return Test(float(value[0]), float(stderr[0]), None, None, None, len(first), "too few documents to test")
    if not of_nll and set(np.unique(first)) | set(np.unique(second)) <= {0.0, 1.0}:
        return _accuracies(first, second)
    return _means(first, second, of_nll, resamples)


def _accuracies(one: Array, other: Array) -> Test:
    n, won, lost = len(one), int(np.sum(one > other)), int(np.sum(one < other))
    value = (won - lost) / n
    stderr = sqrt(max(won + lost - (won - lost) ** 2 / n, 0.0)) / n
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, half = up - down, _Z * sqrt((up + down - (up - down) ** 2) / (n + 2))
    return Test(value, stderr, middle - half, middle + half, sign_test(won, lost), n, "McNemar, exact")


def sign_test(won: int, lost: int) -> float:
    """Two-sided p of `won` against `lost`, where both were equally likely."""
    n, fewer = won + lost, min(won, lost)
    ways = 1
    tail = 1
    for k in range(1, fewer + 1):
        ways = ways * (n - k + 1) // k
        tail += ways
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def _means(one: Array, other: Array, of_nll: bool, resamples: int) -> Test:
    value, stderr = _delta(one[None], other[None], of_nll)
    if stderr[0] == 0:  # the same on every document, or shifted by one number
        same = value[0] == 0
        p = 1.0 if same else sign_test(len(one), 0)
        return Test(float(value[0]), 0.0, float(value[0]), float(value[0]), p, len(one), "equal differences")
    sizes = np.concatenate(
        [_sizes(np.abs(part - value[0]), error) for part, error in _resampled(one, other, of_nll, resamples)]
    )
    with np.errstate(invalid="ignore"):  # between two infinite sizes it is no number: no interval
        quantile = float(np.quantile(sizes, 1 - LEVEL))
    p = (1 + int(np.sum(sizes >= abs(value[0]) / stderr[0]))) / (1 + len(sizes))
    half = quantile * stderr[0]
    low, high = (float(value[0] - half), float(value[0] + half)) if np.isfinite(half) else (None, None)
    return Test(float(value[0]), float(stderr[0]), low, high, p, len(one), "paired bootstrap-t")


def _sizes(change: Array, error: Array) -> Array:
    """|change| / error; a resample without any spread is infinitely far off, unless it is not off at all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found: Array = np.where(change == 0, 0.0, change / error)
    return found


def _resampled(one: Array, other: Array, of_nll: bool, resamples: int) -> Any:
    draws = np.random.default_rng(0)
    rows = max(1, _AT_ONCE // len(one))
    for start in range(0, resamples, rows):
        picked = draws.integers(0, len(one), (min(rows, resamples - start), len(one)))
        yield _delta(one[picked], other[picked], of_nll)


def _delta(one: Array, other: Array, of_nll: bool) -> tuple[Array, Array]:
    """Of rows [R, n]: the difference [R] and its standard error [R], to first order where it is one of perplexities."""
    means = one.mean(axis=1), other.mean(axis=1)
    if not of_nll:
        return means[0] - means[1], _error(one - other)
    scales = np.exp(means[0]), np.exp(means[1])
    return scales[0] - scales[1], _error(scales[0][:, None] * one - scales[1][:, None] * other)


def _error(terms: Array) -> Array:
    found: Array = terms.std(axis=1, ddof=1) / sqrt(terms.shape[1])
    return found


def weighted_difference(parts: Sequence[tuple[float, Sequence[float], Sequence[float]]]) -> Test | None:
    """Of weighted means over several tasks, (weight, one, other) each: the normal approximation of their sum.

    p where few documents differ: exact, by all the signs that their differences could have had. None where a task has
    fewer than LEAST documents, or a value is no number.
    """
    if any(len(one) < LEAST or not np.isfinite([*one, *other]).all() for _, one, other in parts):
        return None
    changes = [
        (weight, np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64))
        for weight, one, other in parts
    ]
    value = sum(weight * float(terms.mean()) for weight, terms in changes)
    stderr = sqrt(sum(weight**2 * float(terms.var(ddof=1)) / len(terms) for weight, terms in changes))
    shares = np.concatenate([weight / len(terms) * terms[terms != 0] for weight, terms in changes])
    if len(shares) <= _FEW:
        p, method = _signs(shares), "weighted means, all signs"
    else:
        p, method = 2 * (1 - NormalDist().cdf(abs(value) / stderr)) if stderr else 0.0, "weighted means, normal"
    count = sum(len(one) for _, one, _ in parts)
    return Test(value, stderr, value - _Z * stderr, value + _Z * stderr, p, count, method)


def _signs(shares: Array) -> float:
    """The chance of a sum as large as that of `shares`, were the sign of each as likely as the other."""
    sums = np.zeros(1)
    for share in shares:
        sums = np.concatenate([sums + share, sums - share])
    return float(np.mean(np.abs(sums) >= abs(shares.sum()) * (1 - 1e-9)))


def recovered_interval(
    intact: Sequence[float], baseline: Sequence[float], full: Sequence[float], of_nll: bool, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95% interval of (baseline - intact) / (baseline - full) by resampling documents; None for fewer than LEAST."""
    columns = [np.asarray(values, dtype=np.float64) for values in (intact, baseline, full)]
    n = len(columns[0])
    if n < LEAST or not np.isfinite(columns).all():
        return None
    draws = np.random.default_rng(0)
    rows, shares = max(1, _AT_ONCE // n), []
    for start in range(0, resamples, rows):
        picked = draws.integers(0, n, (min(rows, resamples - start), n))
        means = [column[picked].mean(axis=1) for column in columns]
        kept, lost, whole = [np.exp(mean) for mean in means] if of_nll else means
        with np.errstate(divide="ignore", invalid="ignore"):
            shares.append((lost - kept) / (lost - whole))
    low, high = np.nanquantile(np.concatenate(shares), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p of each: the chance of any false one among all is then at most the level."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected
