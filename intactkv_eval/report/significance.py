"""Is a paired difference real? One rule for its p and its interval, so that they never contradict each other.

    p < level    exactly where the interval at confidence 1 - level leaves out 0

    means, log-likelihoods, groups of tasks   bootstrap-t over units (resampling.py): delta +- q se, with q the quantile
                                              of |delta* - E*[delta*]| / se*
    accuracies of independent documents       p is the larger one of McNemar's exact test and of Bonett and Price's
                                              interval (Statistical Methods in Medical Research 2012) read as a test;
                                              the interval is theirs, and reaches 0 where the exact test does not reject

Where fewer than TAIL_DRAWS resamples lie beyond a quantile, its tail is Student's, joined to the draws where these are
still many: a p is then as small as the evidence, not as 1 / resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from intactkv_eval.report.resampling import RESAMPLES, Array, Stratum, measured, resampled

LEVEL = 0.05
MIN_ERROR = 8  # units: below, no standard error is shown
MIN_TEST = 20  # units: below, nothing is tested
TAIL_DRAWS = 100
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Tail:
    """The distribution of |delta - true| / se under resampling.

    sizes: one of each resample. degrees: of freedom of se.
    """

    sizes: Array
    degrees: float

    @property
    def _joint(self) -> float:
        """The level from which on Student's tail goes on."""
        return min(0.1, TAIL_DRAWS / len(self.sizes))

    def _drawn(self, level: float) -> float:
        """The largest size that at least the share `level` of the resamples reaches."""
        count = max(1, ceil(level * len(self.sizes) - _ROUNDING))
        place = len(self.sizes) - count
        return float(np.partition(self.sizes, place)[place])

    def quantile(self, level: float) -> float:
        """The size that is exceeded with probability `level`; infinite where the resamples cannot tell."""
        if level >= self._joint:
            return self._drawn(level)
        ratio = float(stdtrit(self.degrees, 1 - level / 2) / stdtrit(self.degrees, 1 - self._joint / 2))
        return self._drawn(self._joint) * ratio

    def exceeded(self, size: float) -> float:
        """The probability of a size as large as this: the level at which `quantile` is `size`."""
        joint = self._drawn(self._joint)
        if size > joint:
            scaled = size / joint * float(stdtrit(self.degrees, 1 - self._joint / 2))
            return float(2 * stdtr(self.degrees, -scaled))
        return float(np.mean(self.sizes >= size))


@dataclass(frozen=True)
class Test:
    """A paired difference: its size, standard error, p, and the interval at any level.

    p: None where there are fewer than MIN_TEST units. units: how many there are to be resampled. method: what found p.
    tail, paired: what the interval is made of; paired are the documents that one run alone has right, those that the
    other one alone has right, and all.
    """

    __test__ = False  # not pytest's

    value: float
    stderr: float
    p: float | None
    units: int
    method: str
    tail: Tail | None = field(default=None, repr=False, compare=False)
    paired: tuple[int, int, int] | None = field(default=None, repr=False)

    def interval(self, level: float = LEVEL) -> tuple[float, float] | None:
        """At confidence 1 - level; leaves out 0 exactly where p < level. None where it cannot be told."""
        if self.p is None:
            return None
        if self.paired is not None:
            middle, error = _bonett_price(*self.paired)
            half = float(ndtri(1 - level / 2)) * error
            low, high = middle - half, middle + half
            return (low, high) if self.p < level else (min(low, 0.0), max(high, 0.0))
        if self.tail is None:  # one shift on every document: no spread to speak of
            return self.value, self.value
        half = self.tail.quantile(level) * self.stderr
        return (self.value - half, self.value + half) if np.isfinite(half) else None


def difference_test(strata: Sequence[Stratum], name: str, resamples: int = RESAMPLES) -> Test | None:
    """The test of a weighted mean of paired differences against 0; None where no standard error can be known.

    strata: whose first value is the difference. name: of the test, with the unit that is resampled.
    """
    units = sum(one.units for one in strata)
    if units < MIN_ERROR:
        return None
    sample = measured(strata)
    value, stderr = float(sample.mean[0]), sqrt(max(sample.covariance[0, 0], 0.0))
    if stderr <= _ROUNDING * abs(value):  # one shift on every document
        p = 1.0 if value == 0 else 0.5 ** (units - 1)
        return Test(value, 0.0, p if units >= MIN_TEST else None, units, "equal differences")
    if units < MIN_TEST:
        return Test(value, stderr, None, units, f"fewer than {MIN_TEST} units, not tested")
    draws = resampled(strata, resamples)
    tail = Tail(draws.studentized(np.eye(len(sample.mean))[0]), sample.degrees)
    return Test(value, stderr, tail.exceeded(abs(value) / stderr), units, name, tail)


def accuracy_test(one: Array, other: Array) -> Test | None:
    """The test of two runs that are right (1.0) or wrong (0.0) on the same independent documents.

    None for fewer than MIN_ERROR documents.
    """
    n, won, lost = len(one), int(np.sum(one > other)), int(np.sum(one < other))
    if n < MIN_ERROR:
        return None
    value = (won - lost) / n
    stderr = sqrt(max(won + lost - (won - lost) ** 2 / n, 0.0)) / n
    if n < MIN_TEST:
        return Test(value, stderr, None, n, f"fewer than {MIN_TEST} units, not tested")
    middle, error = _bonett_price(won, lost, n)
    p = max(sign_test(won, lost), float(2 * ndtr(-abs(middle) / error)))
    return Test(value, stderr, p, n, "McNemar's exact test and Bonett-Price", paired=(won, lost, n))


def sign_test(won: int, lost: int) -> float:
    """McNemar's exact test: the two-sided p of `won` against `lost`, where both were equally likely."""
    n, fewer = won + lost, min(won, lost)
    ways = 1
    tail = 1
    for k in range(1, fewer + 1):
        ways = ways * (n - k + 1) // k
        tail += ways
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def _bonett_price(won: int, lost: int, n: int) -> tuple[float, float]:
    """The middle of Bonett and Price's interval for paired proportions, and what a normal quantile is multiplied by."""
    up, down = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    return up - down, sqrt((up + down - (up - down) ** 2) / (n + 2))
