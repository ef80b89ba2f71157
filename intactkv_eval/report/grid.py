"""The report as values: a row for each cell, a column for each measurement, every figure with what it is compared to.

Renderers (markdown, CSV, LaTeX, JSON, the page) read this and nothing else. Knows no files.
"""

from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import Identity, Run, identity_of
from intactkv_eval.report.compare import Comparison, compare_within
from intactkv_eval.report.family import Verdict, verdicts
from intactkv_eval.report.incomplete import JUDGED
from intactkv_eval.report.index import RunIndex
from intactkv_eval.report.labels import labels_of
from intactkv_eval.report.memory import without_collector
from intactkv_eval.report.planned import Absent
from intactkv_eval.report.refused import Unpaired
from intactkv_eval.report.score import Score
from intactkv_eval.report.seeds import seeds_merged
from intactkv_eval.report.settings import frozen
from intactkv_eval.report.share import ShareSet

Column = tuple[str, str, str]


@dataclass(frozen=True)
class GridEntry:
    """A figure of one cell, and what is said of its differences.

    base, fp, plain, bos: of the differences to the baseline, to full precision, to the checkpoint that was calibrated
    plainly and to the intact [BOS] alone; None where nothing was tested. share: the confidence set of the share
    recovered, at the level of `base`. unpaired: why there is no baseline to compare it with, empty where there is one
    or none is wanted.
    """

    run: Run
    found: Comparison
    base: Verdict | None = None
    fp: Verdict | None = None
    plain: Verdict | None = None
    bos: Verdict | None = None
    share: ShareSet | None = None
    unpaired: str = ""

    @property
    def is_significant(self) -> bool:
        """Whether the difference to the baseline is called real."""
        return self.base is not None and self.base.is_real


@dataclass(frozen=True)
class GridRow:
    """A cell: how it is named in the first four columns, and its figures by column."""

    identity: Identity
    labels: tuple[str, str, str, str]
    entries: Mapping[Column, GridEntry]

    @property
    def run(self) -> Run:
        """One of its runs: all of them are behind the same pivot."""
        return next(iter(self.entries.values())).run


@dataclass(frozen=True)
class Grid:
    """titles: of each column. absent: labels, task and reason of what a sweep planned and has not."""

    rows: tuple[GridRow, ...]
    columns: tuple[Column, ...]
    titles: Mapping[Column, str]
    absent: tuple[tuple[tuple[str, str, str, str], Absent], ...] = ()

    @property
    def refusals(self) -> list[str]:
        """What was not compared with a baseline, and why; one line each."""
        return [
            f"{', '.join(row.labels)}; {self.titles[column]}: {entry.unpaired}"
            for row in self.rows
            for column, entry in row.entries.items()
            if entry.unpaired
        ]

    @property
    def stale(self) -> list[str]:
        """The cells that were measured by an older revision of a formula, and of which; one line each."""
        return [f"{', '.join(row.labels)}: {'; '.join(row.identity.stale)}" for row in self.rows if row.identity.stale]

    @property
    def gaps(self) -> list[str]:
        """What a sweep lacks, and why; one line each."""
        return [
            f"{', '.join(labels)}; {one.task}{'' if one.seed is None else f' seed {one.seed}'}: {_gap(one)}"
            for labels, one in self.absent
        ]

    def gap(self, row: GridRow, column: Column) -> str:
        """`missing` or `failed` where a sweep planned this figure and has it not; else nothing."""
        return self._words.get((row.labels, column[0]), "")

    @cached_property
    def _words(self) -> dict[tuple[tuple[str, str, str, str], str], str]:
        return {(labels, one.task): one.word for labels, one in reversed(self.absent)}  # of several the first


@without_collector()
def grid_of(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> Grid:
    """All runs, one row a cell, full precision first; of several runs of one measurement the newest counts.

    absent: what sweeps lack; their cells have rows too.

    Raises ConfigError where there is nothing to show.
    """
    if not runs:
        raise ConfigError("no run of the model class intactkv among the results: evaluate with --model intactkv")
    runs = seeds_merged(runs)
    if not runs:
        raise ConfigError("the runs hold no figure to compare; answers of mt_bench get theirs from intactkv judge")
    scores = {score.column: score for run in runs for score in run.scores.values()}
    titles = _titles(scores)
    places = {column: place for place, column in enumerate(scores)}
    index = RunIndex(runs)
    unpaired = Unpaired(index)
    rows = []
    lacking = [(_planned(one), one) for one in absent]
    named = labels_of([*(run.identity for run in runs), *(identity for identity, _ in lacking)])
    for identity, scored in _by_cell(runs):
        ordered = sorted(scored, key=places.__getitem__)
        entries = {column: _entry(scored[column], column[0], index, unpaired) for column in ordered}
        rows.append(GridRow(identity, named[identity], entries))
    rows = [_marked_stale(row) for row in _pivots_told_apart(rows)]
    gaps = tuple((named[identity], one) for identity, one in lacking)
    shown = {row.labels for row in rows}
    rows += [
        GridRow(identity, named[identity], {})
        for identity in dict.fromkeys(i for i, _ in lacking)
        if named[identity] not in shown
    ]
    return Grid(_judged(rows), tuple(scores), titles, gaps)


def _planned(one: Absent) -> Identity:
    try:
        return identity_of(one.record)
    # pydantic's ValidationError is a ValueError
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(f"a sweep's plan is damaged ({error}); `intactkv sweep` writes it anew") from None


def _gap(one: Absent) -> str:
    last = one.why.strip().splitlines()[-1] if one.why.strip() else ""
    return one.word if one.word == one.why else f"{one.word}: {last}"


def _marked_stale(row: GridRow) -> GridRow:
    """A row of an older revision says so beside its weights, so that no table shows it as one of today's."""
    if not row.identity.stale:
        return row
    name, weights, kv, pivot = row.labels
    return replace(row, labels=(name, f"{weights} [stale]", kv, pivot))


def _pivots_told_apart(rows: Sequence[GridRow]) -> list[GridRow]:
    """Rows of one name with other pivots: beside it their file's whole name, their tokens, or a hash of their KV."""
    for of in _OF_PIVOT:
        alike: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for row in rows:
            alike[row.labels].add(of(row))
        rows = [
            replace(row, labels=(*row.labels[:3], f"{row.labels[3]} [{of(row)}]"))
            if len(alike[row.labels]) > 1
            else row
            for row in rows
        ]
    return list(rows)


_OF_PIVOT: Sequence[Callable[[GridRow], str]] = (
    lambda row: row.identity.cell.pivot.source,
    lambda row: " ".join(map(str, row.run.pivot_tokens)),
    lambda row: row.run.rows or "",
)


def _entry(run: Run, task: str, index: RunIndex, unpaired: Unpaired) -> GridEntry:
    found = compare_within(run, task, index)
    wanted = run.identity.cell.pivot.intact and found.to_baseline is None
    return GridEntry(run, found, unpaired=(found.wanted or unpaired.why(run, task)) if wanted else "")


def _judged(rows: Sequence[GridRow]) -> tuple[GridRow, ...]:
    """The rows with their verdicts; a family is one kind of difference in one column, among the cells of one model."""
    entries = {(n, c): e for n, row in enumerate(rows) for c, e in row.entries.items()}
    models = [_base_model(row.identity) for row in rows]
    family = {(n, c): (c, models[n]) for n, c in entries}
    controls = {n for n, row in enumerate(rows) if row.identity.is_full_precision}
    base = verdicts({at: None if at[0] in controls else e.found.to_baseline for at, e in entries.items()}, family)
    fp = verdicts({at: e.found.to_full_precision for at, e in entries.items()}, family)
    plain = verdicts({at: e.found.to_plain for at, e in entries.items()}, family)
    bos = verdicts({at: e.found.to_bos for at, e in entries.items()}, family)
    said = {
        at: replace(
            e, base=base.get(at), fp=fp.get(at), plain=plain.get(at), bos=bos.get(at), share=_share(e, base.get(at))
        )
        for at, e in entries.items()
    }
    return tuple(replace(row, entries={c: said[n, c] for c in row.entries}) for n, row in enumerate(rows))


def _share(entry: GridEntry, base: Verdict | None) -> ShareSet | None:
    share, delta = entry.found.share, entry.found.to_baseline
    if share is None or base is None or delta is None or delta.test is None or not entry.found.is_loss:
        return None
    return share.within(base.level, is_real=base.is_real)


def _base_model(identity: Identity) -> str:
    """The model that a cell is made of, by the last part of its name."""
    return PurePath(identity.made_from or identity.cell.model.reference or identity.cell.model.pretrained).name


_Cell = tuple[Identity, tuple[int, ...], str | None]


def _by_cell(runs: Sequence[Run]) -> list[tuple[Identity, dict[Column, Run]]]:
    """Each model behind one pivot with its newest run of each column; full precision first, then by bits, baseline
    before intact. A pivot's file may have been written anew, and a name mean other tokens: those are other cells.
    """
    found: dict[_Cell, dict[Column, Run]] = {}
    for run in runs:
        key = run.identity, run.pivot_tokens, run.rows
        found.setdefault(key, {}).update({score.column: run for score in run.scores.values()})

    def place(item: tuple[_Cell, object]) -> tuple[object, ...]:
        identity, cell = item[0][0], item[0][0].cell
        weights = (not identity.is_full_precision, cell.weights.method, -(cell.weights.bits or 16))
        stages = (-cell.activations.bits, cell.weights.rotate, -cell.kv.bits, cell.kv.scheme, cell.kv.sink_tokens)
        pivot = (cell.pivot.source != "bos", cell.pivot.source, cell.pivot.intact)
        return cell.model.pretrained, *weights, *stages, *pivot, str(item[0])

    return [(key[0], scored) for key, scored in sorted(found.items(), key=place)]


def _titles(scores: Mapping[Column, Score]) -> dict[Column, str]:
    """The title of each column, with the settings in which it differs from others of the same task."""
    values: dict[tuple[str, str], set[Hashable]] = defaultdict(set)
    for score in scores.values():
        for key, value in score.settings.items():
            values[score.task, key].add(frozen(value))
    several = {place for place, found in values.items() if len(found) > 1}
    return {column: _title(score, several) for column, score in scores.items()}


def _title(score: Score, several: Container[tuple[str, str]]) -> str:
    """Task and metric, the protocol, and what sets this column apart: the settings of its task that have `several`."""
    arrow = "↑" if score.higher_is_better else "↓"
    notes = [score.settings["protocol"]]
    if score.settings["limit"]:
        notes.append(f"limit {score.settings['limit']:g}")
    if score.settings[JUDGED]:
        notes.append(f"{score.settings[JUDGED]} questions judged whole")
    for key, value in score.settings.items():
        if key not in {"protocol", "limit", JUDGED} and (score.task, key) in several:
            notes.append(f"{key} {value}")
    named = ", ".join(str(note) for note in notes if note)
    return f"{score.task} {score.metric}{arrow}" + (f" ({named})" if named else "")
