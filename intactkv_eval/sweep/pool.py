"""What runs units is a pool of slots: each takes one unit at a time, and tells how it ended. Knows no lm_eval.

ended.error None            the unit's results are in the sweep's folder
ended.error, not died       it raised: it would again
died                        its process is gone (killed, out of memory): it may be tried again
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from intactkv_eval.sweep.grid import Unit


class JobResult(NamedTuple):
    """How a unit ended in a slot."""

    slot: int
    error: str | None
    seconds: float
    died: bool = False


class Pool(Protocol):
    """Slots are numbered from 0."""

    @property
    def names(self) -> Sequence[str]:
        """What each slot is, for people."""

    def submit(self, slot: int, unit: Unit) -> None:
        """Begin; the slot must be idle."""

    def wait(self, seconds: float) -> list[JobResult]:
        """What ended, as soon as something has, or nothing after `seconds`."""

    def close(self) -> None:
        """End every process, at once."""
