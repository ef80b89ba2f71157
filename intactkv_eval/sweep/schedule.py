"""Which unit goes to which slot, and what becomes of those that end. Knows no processes.

A slot goes on with what shares its quantized model, then with what shares its full-precision model, then takes up the
first that nobody has begun; only when all are begun does it help another.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.pool import JobResult, Pool

Group = tuple[int, tuple[bool, int, int]]
_TICK = 1.0  # seconds between two looks at the slots


class UnitFinished(NamedTuple):
    """A unit that ended for good. error: None where it is done."""

    unit: Unit
    error: str | None
    seconds: float


class State(NamedTuple):
    """A look at a sweep under way. running: of each slot."""

    running: dict[int, Unit]
    waiting: int


def next_unit(waiting: Sequence[Unit], last: Unit | None, others: Sequence[Unit]) -> Unit:
    """Of `waiting`, in their order, for a slot that ran `last` while the other slots run `others`."""
    taken = {_group(unit) for unit in others}
    free = [unit for unit in waiting if _group(unit) not in taken]
    if last is not None:
        for near in (_group, _model):
            for unit in free if near is _model else waiting:
                if near(unit) == near(last):
                    return unit
    return free[0] if free else waiting[-1]


def run_units(
    units: Sequence[Unit],
    pool: Pool,
    folder: SweepFolder,
    retries: int,
    happened: Callable[[UnitFinished], None],
    look: Callable[[State], None],
) -> list[UnitFinished]:
    """Run all units; how each ended, in the order of their ends. A failed one is kept as such in `folder`."""
    waiting, ended, tried = list(units), [], dict.fromkeys((unit.key for unit in units), 0)
    running: dict[int, Unit] = {}
    last: dict[int, Unit] = {}
    while waiting or running:
        for slot in range(len(pool.names)):
            if slot not in running and waiting:
                unit = next_unit(waiting, last.get(slot), list(running.values()))
                waiting.remove(unit)
                running[slot] = last[slot] = unit
                pool.submit(slot, unit)
        look(State(dict(running), len(waiting)))
        for end in pool.wait(_TICK):
            unit = running.pop(end.slot)
            tried[unit.key] += 1
            if end.died and tried[unit.key] <= retries:
                waiting.insert(0, unit)
                continue
            found = UnitFinished(unit, _why(end, tried[unit.key]), end.seconds)
            if found.error is not None:
                folder.fail(unit.key, found.error)
            ended.append(found)
            happened(found)
    look(State({}, 0))
    return ended


def _why(end: JobResult, times: int) -> str | None:
    return f"{end.error}, {times} times" if end.died and times > 1 else end.error


def _group(unit: Unit) -> Group:
    return unit.model, unit.weights


def _model(unit: Unit) -> int:
    return unit.model
