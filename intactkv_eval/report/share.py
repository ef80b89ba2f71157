"""The share of a loss that is given back, with a confidence set that is honest where the loss itself is uncertain.

    share = mean(baseline - intact) / mean(baseline - full precision),  each over the same documents

The set at confidence 1 - level holds every s that the bootstrap-t test of mean(b - i) - s mean(b - f) = 0 does not
reject (Fieller, JRSS B 1954, with quantiles of the resamples instead of Student's). At s = 0 that is the test of the
difference to the baseline, so the set leaves out 0 exactly where the difference is called real. Where the loss cannot
be told from none the set is unbounded, and says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import atan2, cos, inf, pi, sin, sqrt, tan

import numpy as np

from intactkv_eval.report.resampling import RESAMPLES, Measured, Resampled, Stratum, measured, resampled
from intactkv_eval.report.significance import LEVEL, MIN_TEST, Tail

_HALVINGS = 26  # of half a turn: angles to 5e-8


@dataclass(frozen=True)
class ShareSet:
    """From `low` to `high`; where `is_outside`, everything up to `low` and everything from `high` on instead.

    Every share there is: from -inf to inf.
    """

    low: float
    high: float
    is_outside: bool = False

    @property
    def is_bounded(self) -> bool:
        """Whether it ends on both sides."""
        return not self.is_outside and self.low > -inf and self.high < inf

    def holds(self, share: float) -> bool:
        """Whether this share is not rejected."""
        if self.is_outside:
            return share <= self.low or share >= self.high
        return self.low <= share <= self.high


@dataclass(frozen=True)
class Share:
    """value: the share itself. units: how many were resampled."""

    value: float
    units: int
    sample: Measured = field(repr=False, compare=False)
    draws: Resampled = field(repr=False, compare=False)

    def within(self, level: float = LEVEL, is_real: bool | None = None) -> ShareSet:
        """The confidence set at 1 - level.

        is_real: whether the difference to the baseline is called real by another test than the bootstrap-t's (that of
        accuracies); 0 is then in the set or out of it as that test has it.
        """
        start, far = self._angle(self.value), self._farthest
        found = _arc(lambda angle: self._is_rejected(angle, level), start, far, self._scale)
        return found if is_real is None else _agreeing(found, is_real, self.value)

    @property
    def _scale(self) -> float:
        """Standard error of the numerator over that of the denominator: angles are taken of s / scale."""
        given, lost = sqrt(self.sample.covariance[0, 0]), sqrt(self.sample.covariance[1, 1])
        return given / lost if given > 0 and lost > 0 else 1.0

    @property
    def _farthest(self) -> float:
        """The angle whose share is farthest from the data in standard errors: the direction covariance^-1 mean."""
        scaled = np.array([1.0, -self._scale])
        covariance = self.sample.covariance * np.outer(scaled, scaled)
        direction = np.linalg.pinv(covariance) @ (self.sample.mean * scaled)
        return float(np.arctan2(direction[1], direction[0]))

    def _angle(self, share: float) -> float:
        return atan2(share / self._scale, 1.0)

    def _is_rejected(self, angle: float, level: float) -> bool:
        """Of s = scale * tan(angle), infinity at a right angle."""
        direction = np.array([cos(angle), -sin(angle) * self._scale])
        value = abs(float(self.sample.mean @ direction))
        error = sqrt(max(float(direction @ self.sample.covariance @ direction), 0.0))
        tail = Tail(self.draws.studentized(direction), self.sample.degrees)
        return value > tail.quantile(level) * error


def share_of(strata: Sequence[Stratum], resamples: int = RESAMPLES) -> Share | None:
    """The share of two differences, baseline - intact and baseline - full precision, [.., 2] in each stratum.

    None for fewer than MIN_TEST units, or where baseline and full precision are the same.
    """
    units = sum(one.units for one in strata)
    sample = measured(strata)
    given, lost = (float(value) for value in sample.mean)
    if units < MIN_TEST or lost == 0:
        return None
    return Share(given / lost, units, sample, resampled(strata, resamples))


def _arc(is_rejected: Callable[[float], bool], start: float, far: float, scale: float) -> ShareSet:
    """The angles around `start` that are not rejected, as shares. far: the angle that is rejected first, if any is."""
    if not is_rejected(far):
        return ShareSet(-inf, inf)
    above = start + (far - start) % pi
    low, high = _border(is_rejected, start, above - pi), _border(is_rejected, start, above)
    ends = scale * tan(low), scale * tan(high)
    crossed = low < -pi / 2 or high > pi / 2
    return ShareSet(ends[1], ends[0], is_outside=True) if crossed else ShareSet(*ends)


def _border(is_rejected: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last angle that is not rejected, from one inside of the set towards one outside of it."""
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        if is_rejected(middle):
            outside = middle
        else:
            inside = middle
    return inside


def _agreeing(found: ShareSet, is_real: bool, share: float) -> ShareSet:
    """The set with 0 in it, or without it: its nearest end is moved to 0."""
    if found.holds(0.0) == (not is_real):
        return found
    if not is_real:
        if found.is_outside:  # 0 lies in the gap
            return ShareSet(max(found.low, 0.0), found.high, True) if share < 0 else ShareSet(found.low, 0.0, True)
        return ShareSet(min(found.low, 0.0), max(found.high, 0.0))
    nothing = float(np.nextafter(0.0, share))
    if found.is_outside:
        return found
    return ShareSet(nothing, found.high) if share > 0 else ShareSet(found.low, nothing)
