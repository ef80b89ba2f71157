"""What a sweep will take, before it runs: by what its cells have taken already, else by counting operations.

operations of a cell = 2 x parameters x tokens of its task
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from statistics import fmean

from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.preparation import CalibratePreparation, CodebookPreparation, QuantizePreparation

_WINDOW = 2048
# Tokens that a task puts through the model, about, and its documents. MMLU: 5 shots are computed once a subject.
_TOKENS: Mapping[str, tuple[int, int]] = {
    "ppl_wikitext2": (166 * _WINDOW, 166),
    "ppl_c4": (256 * _WINDOW, 256),
    "ppl_ptb": (50 * _WINDOW, 50),
    "mmlu_5shot": (14_042 * 100 + 57 * 600, 14_042),
    "mmlu_0shot": (14_042 * 120, 14_042),
    "qa_0shot": (3_900_000, 30_000),
    "mt_bench": (80 * 2 * 400, 80),
}
_SIZE = re.compile(r"(?:^|[-_])(\d+(?:\.\d+)?)([bm])(?:$|[-_])", re.IGNORECASE)


def estimate(units: Sequence[Unit], every: Sequence[Unit], folder: SweepFolder, slots: int) -> list[str]:
    """Lines for people: what is left of `every` unit, loads, what is made, time or operations."""
    made = {one.name: one for unit in units for one in unit.preparations}
    missing = [one for name, one in made.items() if not (folder.made / name).exists()]
    kinds = {
        "quantized": QuantizePreparation,
        "KV codebooks": CodebookPreparation,
        "pivots trained": CalibratePreparation,
    }
    counts = [f"{sum(isinstance(one, kind) for one in missing)} {name}" for name, kind in kinds.items()]
    loads = len({(unit.model, unit.weights if unit.weights[0] else None) for unit in units})
    lines = [f"{len(every)} cells, {len(every) - len(units)} done, {len(units)} to run on {slots} at a time; "
             f"{loads} models loaded, {', '.join(counts)}"]  # fmt: skip
    taken = _taken(every, folder)
    known = [_seconds(unit, taken) for unit in units]
    if units and None not in known:
        total = sum(value for value in known if value is not None) / slots
        lines.append(f"about {_readable(total)}, by what such cells took here (what is made besides)")
    elif units:
        lines.append(_operations(units))
    return lines


def _taken(every: Sequence[Unit], folder: SweepFolder) -> Mapping[tuple[object, ...], list[float]]:
    taken: dict[tuple[object, ...], list[float]] = defaultdict(list)
    for unit in every:
        seconds = folder.seconds(unit.key)
        if seconds is not None:
            taken[_kind(unit)].append(seconds)
    return taken


def _seconds(unit: Unit, taken: Mapping[tuple[object, ...], list[float]]) -> float | None:
    return fmean(taken[_kind(unit)]) if _kind(unit) in taken else None


def _kind(unit: Unit) -> tuple[object, ...]:
    return unit.model, unit.task.task, unit.task.limit


def _operations(units: Sequence[Unit]) -> str:
    total, unknown = 0.0, set()
    for unit in units:
        name = PurePath(str(unit.arguments.get("reference") or unit.source)).name
        size, task = _parameters(name), _TOKENS.get(unit.task.task)
        if size is None or task is None:
            unknown.add(unit.task.task if task is None else name)
            continue
        tokens, documents = task
        share = min(1.0, (unit.task.limit or documents) / documents) if (unit.task.limit or 1) >= 1 else unit.task.limit
        total += 2 * size * tokens * (share or 1.0)
    said = f"about {total:.1e} operations (2 x parameters x tokens)" if total else "no estimate"
    return said + (f"; unknown: {', '.join(sorted(unknown))}" if unknown else "")


def _parameters(name: str) -> float | None:
    found = _SIZE.search(name)
    return float(found[1]) * (1e9 if found[2].lower() == "b" else 1e6) if found else None


def _readable(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
