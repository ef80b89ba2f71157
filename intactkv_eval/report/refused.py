"""Why an intact run stands without a baseline: what differs between it and the nearest run that could be one.

Every figure of a large folder may lack its baseline, and each is compared with all that could be it. So what is
compared is written as whole numbers once (the same value, the same number), and the differences are counted in numpy.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from intactkv_eval.report.alike import unlike
from intactkv_eval.report.collect import Identity, Run
from intactkv_eval.report.identities import baseline_of, by_tokens, comparable
from intactkv_eval.report.index import RunIndex
from intactkv_eval.report.score import Score
from intactkv_eval.report.settings import frozen, key_of

_SHOWN = 4
_HASH = "weights' hash"
_NO_RUN = "no run without an intact pivot on this task (pivot=none, or the same pivot with intact=false)"
_SMALL = 1e290  # figures below: their difference from any other finite one is a number
_Counts = NDArray[np.int64]


class Unpaired:
    """Says why runs have no baseline among those of an index."""

    def __init__(self, index: RunIndex) -> None:
        self._index = index
        self._runs = [run for run in index.runs if not run.identity.cell.pivot.intact]
        self._tasks: dict[str, _OfTask] = {}
        self._last: tuple[Identity, tuple[int, ...], _Counts] | None = None

    def why(self, run: Run, task: str) -> str:
        """Names the differences to the nearest run of the task whose pivot is not intact; says so if there is none."""
        if task not in self._tasks:
            self._tasks[task] = _OfTask(task, self._runs, self._index)
        of_task = self._tasks[task]
        if not of_task.scores:
            return _NO_RUN
        counts = self._between(run)[of_task.places] + of_task.between(run.scores[task])
        other = self._runs[of_task.places[int(np.argmin(counts))]]  # the first of the nearest
        nearest = _differences(run, other, task)
        more = "" if len(nearest) <= _SHOWN else f" and {len(nearest) - _SHOWN} more"
        return f"no baseline with the same settings; the nearest differs in {', '.join(nearest[:_SHOWN])}{more}"

    def _between(self, run: Run) -> _Counts:
        """How many settings of its cell, and of its tokens, each run that could be a baseline has otherwise."""
        if self._last is None or self._last[:2] != (run.identity, run.pivot_tokens):
            wanted = baseline_of(run.identity)
            counts = self._cells.between(_flat(wanted), set() if wanted.source_hash else {_HASH})[self._cell_of]
            tokens = self._token_numbers.get(run.pivot_tokens, -1)
            self._last = run.identity, run.pivot_tokens, counts + (self._tokens != tokens)
        return self._last[2]

    @cached_property
    def _known(self) -> dict[Identity, int]:
        return {identity: place for place, identity in enumerate(dict.fromkeys(run.identity for run in self._runs))}

    @cached_property
    def _cell_of(self) -> _Counts:
        return np.array([self._known[run.identity] for run in self._runs], dtype=np.int64)

    @cached_property
    def _cells(self) -> "_Table":
        return _Table([_flat(by_tokens(identity)) for identity in self._known])

    @cached_property
    def _token_numbers(self) -> dict[tuple[int, ...], int]:
        return {tokens: place for place, tokens in enumerate(dict.fromkeys(run.pivot_tokens for run in self._runs))}

    @cached_property
    def _tokens(self) -> _Counts:
        return np.array([self._token_numbers[run.pivot_tokens] for run in self._runs], dtype=np.int64)


class _OfTask:
    """The scores on one task of the runs that could be a baseline. places: which of those runs have one."""

    def __init__(self, task: str, runs: Sequence[Run], index: RunIndex) -> None:
        self._index = index
        self.places = np.array([place for place, run in enumerate(runs) if task in run.scores], dtype=np.int64)
        self.scores = [run.scores[task] for run in runs if task in run.scores]
        self._last: tuple[Hashable, _Counts] | None = None

    def between(self, score: Score) -> _Counts:
        """How much `unlike` finds between a score and each of them; that of a score like the last one is known."""
        is_small = isfinite(score.value) and abs(score.value) < _SMALL
        figure = None if is_small else score.value
        logged = self._index.number_of(score)
        like = key_of(score.settings), score.metric, score.documents, frozen(score.drawn), logged, figure
        if self._last is None or self._last[0] != like:
            self._last = like, self._counted(score)
        return self._last[1]

    def _counted(self, score: Score) -> _Counts:
        """Scores of one kind are compared with once; only the figures differ."""
        counts = np.zeros(len(self.scores), dtype=np.int64)
        for places in self._kinds:
            first = self.scores[places[0]]
            found = unlike(score, first)
            is_number = isfinite(score.value - first.value)
            counts[places] = len(found) - (not is_number)
        with np.errstate(all="ignore"):
            return counts + ~np.isfinite(score.value - self._figures)

    @cached_property
    def _figures(self) -> NDArray[np.float64]:
        return np.array([score.value for score in self.scores], dtype=np.float64)

    @cached_property
    def _kinds(self) -> list[list[int]]:
        kinds: dict[Hashable, list[int]] = defaultdict(list)
        for place, one in enumerate(self.scores):
            logged = self._index.number_of(one)
            kinds[key_of(one.settings), one.metric, one.documents, frozen(one.drawn), logged].append(place)
        return list(kinds.values())


class _Table:
    """Mappings as rows of whole numbers: in each column the same number for equal values, 0 for None and for none."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        names = list(dict.fromkeys(name for row in rows for name in row))
        self._numbers: dict[str, dict[Hashable, int]] = {name: {None: 0} for name in names}
        columns = {}
        for name, known in self._numbers.items():
            columns[name] = np.array([known.setdefault(frozen(row.get(name)), len(known)) for row in rows], np.int64)
        # In most columns of most folders all are equal.
        self._same = {name: int(column[0]) for name, column in columns.items() if (column == column[0]).all()}
        self._varied = {name: column for name, column in columns.items() if name not in self._same}
        self._rows = len(rows)

    def between(self, wanted: Mapping[str, Any], left_out: set[str]) -> _Counts:
        """In how many names, but for those left out, each row differs from `wanted`."""
        more = sum(value is not None for name, value in wanted.items() if name not in self._numbers)
        at = {name: known.get(frozen(wanted.get(name)), -1) for name, known in self._numbers.items()}
        more += sum(at[name] != number for name, number in self._same.items() if name not in left_out)
        counts = np.full(self._rows, more, dtype=np.int64)
        for name, column in self._varied.items():
            if name not in left_out:
                counts += column != at[name]
        return counts


def _differences(run: Run, other: Run, task: str) -> list[str]:
    """All that keeps `other` from being the baseline of `run`."""
    baseline = baseline_of(run.identity)
    wanted, theirs = _flat(baseline), _flat(comparable(other.identity, baseline))
    differences = [
        f"{key} ({wanted.get(key)}, {theirs.get(key)})"
        for key in sorted(wanted.keys() | theirs.keys())
        if wanted.get(key) != theirs.get(key)
    ]
    if other.pivot_tokens != run.pivot_tokens:
        differences.append(f"tokens in front ({list(run.pivot_tokens)}, {list(other.pivot_tokens)})")
    return differences + unlike(run.scores[task], other.scores[task])


def _flat(identity: Identity) -> dict[str, Any]:
    """Every setting of an identity under one name."""
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                put(f"{name}.{key}" if name else str(key), part)
        else:
            found[name] = value

    put("", identity.cell.model_dump(mode="json"))
    put("hf", dict(identity.hf_arguments))
    put("formula revision", dict(identity.formulas))
    found |= {_HASH: identity.source_hash, "checkpoint": identity.checkpoint, "search": identity.awq_search}
    found["symmetric formula"] = identity.symmetric_formula
    return found
