"""The tests of one family, and what they say together: a star and a bracket that never contradict each other.

A family is the set of differences of one kind (to a baseline, to full precision, ...) in one column, among the cells
of one model. With m of them each is tested at LEVEL / m (Bonferroni), and its interval has confidence 1 - LEVEL / m, so
that all intervals of a family hold together with 95%:

    star    exactly where the interval leaves out 0, that is where m p < LEVEL

Other columns, other models and controls (cells in full precision) are in no family but their own or none, so what is
reported beside a table does not change it.
"""

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from intactkv_eval.report.compare import Delta
from intactkv_eval.report.significance import LEVEL

Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class Verdict:
    """What is said of one difference among `tests` of its family.

    p: of all of them, min(1, tests * p). level: at which each was tested. low, high: the simultaneous interval in the
    figure's unit, None where none can be told.
    """

    p: float
    tests: int
    low: float | None
    high: float | None

    @property
    def level(self) -> float:
        """LEVEL / tests."""
        return LEVEL / self.tests

    @property
    def is_real(self) -> bool:
        """Whether the difference is called real, a star in tables."""
        return self.p < LEVEL


def verdicts(deltas: Mapping[Place, Delta | None], family: Mapping[Place, Hashable]) -> dict[Place, Verdict]:
    """Of every difference that was tested. family: of each place."""
    tested = [
        (place, delta, delta.test.p)
        for place, delta in deltas.items()
        if delta is not None and delta.test is not None and delta.test.p is not None
    ]
    counts = Counter(family[place] for place, _, _ in tested)
    found = {}
    for place, delta, p in tested:
        tests = counts[family[place]]
        low, high = delta.interval(LEVEL / tests) or (None, None)
        found[place] = Verdict(min(1.0, tests * p), tests, low, high)
    return found
