"""From a sweep's grids to its units: one cell, one task, one seed each, every one checked before anything runs.

A unit's key is the digest of all that decides its figures (arguments resolved to what they stand for, what is made for
it, task, seed, versions): two sweeps that hold the same unit share its result, wherever their files lie.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import prod
from pathlib import PurePath
from typing import Any

from pydantic import ValidationError

from intactkv_eval.cell.arguments import CELL_KEYS, cell_from_args
from intactkv_eval.cell.formulas import current, names_of_cell, names_of_prompts
from intactkv_eval.cell.spec import CellSpec, Spec, pivot_kind
from intactkv_eval.errors import ConfigError, IntactKVError, unknown_key
from intactkv_eval.lm import run_record
from intactkv_eval.lm.hf_arguments import KNOWN, check_names, checked_cell, split_model_args
from intactkv_eval.mt_bench.sources import PUBLISHED
from intactkv_eval.sweep.identity import key_of
from intactkv_eval.sweep.preparation import (
    MADE,
    CalibratePreparation,
    CodebookPreparation,
    Preparation,
    QuantizePreparation,
)
from intactkv_eval.sweep.spec import (
    CalibrateSpec,
    CodebookSpec,
    Entry,
    GridSpec,
    QuantizeSpec,
    SweepSpec,
    TaskSpec,
    readable,
    unknown_keys,
)

BENCHES = {path.partition("/")[0] for path in PUBLISHED if "/" in path}
"""The tasks whose prompts are chat prompts without `apply_chat_template`."""
MOST_CELLS = 10_000
versions = cache(run_record.versions)  # reading them takes longer than all else that a cell's key needs
_MADE: tuple[tuple[str, str, type[Spec]], ...] = (
    ("weights", "quantize", QuantizeSpec),
    ("kv", "codebook", CodebookSpec),
    ("pivots", "calibrate", CalibrateSpec),
)
_OF = {
    "weights": ("weights", "bits", "group_size", "symmetric", "awq_search", "rotate", "backend", "quantize"),
    "activations": ("act_bits", "act_scheme", "act_symmetric", "act_clip"),
    "kv": ("kv_bits", "kv_scheme", "kv_sink_tokens", "kv_group_size", "kv_residual_length", "kv_quantize_pivot",
           "kv_rotate", "kv_clip", "kv_codebook", "codebook"),
    "pivots": ("pivot", "intact", "pivot_transfer", "chat_template", "chat_date", "calibrate"),
}  # fmt: skip
_OF_PIVOT = ("pivot", "intact", "chat_template", "chat_date")
_OF_EXCLUDE = (*CELL_KEYS, *KNOWN, *(key for _, key, _ in _MADE), "task", "seed")
_OF_THE_RUN = {"device": "--devices", "batch_size": "`run` of the YAML"}


@dataclass(frozen=True)
class Unit:
    """One cell on one task. arguments: of the model, files that are made as MADE/name. place: in the sweep's order.

    model, weights: which entries it comes from; units that share both share their loaded model. begun: when the sweep
    was, which its chat prompts are rendered as of; it is no part of the key.
    """

    arguments: Mapping[str, Any]
    preparations: tuple[Preparation, ...]
    task: TaskSpec
    seed: int | None
    model: int
    weights: tuple[bool, int, int]
    begun: str | None = None

    @cached_property
    def key(self) -> str:
        """What its result is kept under."""
        made = [preparation.name for preparation in self.preparations]
        task = self.task.model_dump(exclude={"seeds"})
        is_chat = task["apply_chat_template"] or self.task.task in BENCHES
        formulas = current([*names_of_cell(self.cell), *names_of_prompts(self.cell, is_chat)])
        said = {"arguments": dict(self.arguments), "made": made, "task": task, "seed": self.seed, "formulas": formulas}
        return key_of({**said, "versions": versions()})

    @property
    def cell(self) -> CellSpec:
        """The cell, as its arguments say it."""
        return cell_from_args({key: value for key, value in self.arguments.items() if key in CELL_KEYS})

    @property
    def quantize(self) -> QuantizePreparation | None:
        """How its checkpoint is made, if it is."""
        return next((one for one in self.preparations if isinstance(one, QuantizePreparation)), None)

    @property
    def source(self) -> str:
        """The name of its model, of the full-precision one where a checkpoint is made."""
        return PurePath(str((self.quantize.model if self.quantize else self.arguments)["pretrained"])).name

    @property
    def label(self) -> str:
        """For people: model, weights, KV, pivot, task, seed, limit."""
        cell, quantize = self.cell, self.quantize
        weights = quantize.label if quantize else _weights(cell)
        kv = "kv16" if cell.kv.bits == 16 else f"kv{cell.kv.bits} {cell.kv.scheme}"
        kv += f" sink {cell.kv.sink_tokens}" if cell.kv.sink_tokens else ""
        trained = any(isinstance(one, CalibratePreparation) for one in self.preparations)
        named = "calibrated" if trained else PurePath(cell.pivot.source).name
        pivot = named if cell.pivot.intact else "none" if named == "bos" else f"{named} computed"
        act = "" if cell.activations.bits == 16 else f" a{cell.activations.bits}"
        seed = "" if self.seed is None else f" seed {self.seed}"
        seed += "" if self.task.limit is None else f" limit {self.task.limit:g}"
        return f"{self.source} | {weights}{act} | {kv} | {pivot} | {self.task.task}{seed}"


def expand(sweep: SweepSpec) -> list[Unit]:
    """Every unit of the sweep's grids once, those that share a loaded model beside each other.

    Raises ConfigError that names the combination, for an argument that is unknown, out of range or does nothing; and,
    before anything is expanded, for more than 10,000 cells.
    """
    check_entries(sweep)
    cells = sum(_count(grid) for grid in sweep.grids)
    if cells > MOST_CELLS:
        raise ConfigError(f"the sweep's lists multiply to {cells} cells; expected at most {MOST_CELLS}: shorten them")
    found: dict[str, Unit] = {}
    models, weights, activations = (_GridPlaces() for _ in range(3))
    for grid in sweep.grids:
        for parts in product(grid.models, grid.weights, grid.activations, grid.kv):
            order = "quantize" in parts[1], weights.of(parts[1]), activations.of(parts[2])
            for unit in _units(grid, parts, models.of(parts[0]), order):
                found.setdefault(unit.key, unit)
    if not found:
        raise ConfigError("the sweep holds no cell: everything is excluded")
    return sorted(found.values(), key=lambda unit: (unit.model, unit.weights))


class _GridPlaces(list[Entry]):
    """Entries in the order in which they came first, whatever grid they are of."""

    def of(self, entry: Entry) -> int:
        try:
            return self.index(entry)
        except ValueError:
            self.append(entry)
            return len(self) - 1


def _count(grid: GridSpec) -> int:
    """Its cells, those that are excluded among them."""
    runs = sum(len(_seeds(task, grid)) for task in grid.tasks)
    lists = (grid.models, grid.weights, grid.activations, grid.kv, grid.pivots)
    return runs * prod(len(entries) for entries in lists)


def _units(grid: GridSpec, parts: Sequence[Entry], model: int, order: tuple[bool, int, int]) -> Iterator[Unit]:
    for pivot in grid.pivots:
        flat = _joined((*parts, pivot))
        wanted = [(task, seed) for task in grid.tasks for seed in _seeds(task, grid)
                  if not _excluded(flat, task, seed, grid.exclude)]  # fmt: skip
        if wanted:
            arguments, preparations = _resolved(flat, parts[0])
            yield from (Unit(arguments, preparations, task, seed, model, order) for task, seed in wanted)


def check_entries(sweep: SweepSpec) -> None:
    """Raise ConfigError for an entry that names no model, and first of all for a key that no entry of its list has."""
    for grid in sweep.grids:
        _check_keys(grid)
    for entry in (entry for grid in sweep.grids for entry in grid.models):
        if "pretrained" not in entry:
            raise ConfigError(f"models: {entry} names no model; add pretrained: <folder or hub id>")
        for key, instead in _OF_THE_RUN.items():
            if entry.get(key) is not None:
                raise ConfigError(f"models: {key}: is the whole sweep's; choose it with {instead}")


def _check_keys(grid: GridSpec) -> None:
    for entry in grid.models:
        try:
            check_names(*split_model_args(entry))
        except ConfigError as error:
            raise ConfigError(f"models: {error}") from None
    for name, known in {**_OF, "exclude": _OF_EXCLUDE}.items():
        for entry in getattr(grid, name):
            for key in entry:
                if key not in known:
                    raise ConfigError(f"{name}: {unknown_key(key, list(known))}")
    for name, key, spec in _MADE:
        for entry in getattr(grid, name):
            wrong = unknown_keys(entry[key], spec) if key in entry else None
            if wrong is not None:
                raise ConfigError(f"{name}: {key}: {wrong}")


def _joined(parts: Sequence[Entry]) -> Entry:
    flat: Entry = {}
    for part in parts:
        for key, value in part.items():
            if key in flat and flat[key] != value:
                raise ConfigError(f"{key}: given twice for one cell ({flat[key]!r}, {value!r}); keep it in one list")
            flat[key] = value
    return flat


def _seeds(task: TaskSpec, grid: GridSpec) -> tuple[int | None, ...]:
    return (task.seeds if task.seeds is not None else grid.seeds) or (None,)


def _excluded(flat: Entry, task: TaskSpec, seed: int | None, rules: Sequence[Entry]) -> bool:
    said = {**flat, "task": task.task, "seed": seed}
    if isinstance(flat.get("quantize"), Mapping):
        said["quantize"] = flat["quantize"].get("preset") or flat["quantize"].get("method", "rtn")
    said |= {key: value is not None for key, value in said.items() if key in {"codebook", "calibrate"}}
    return any(all(said.get(key) in (value if isinstance(value, list) else [value]) for key, value in rule.items())
               for rule in rules)  # fmt: skip


def _resolved(flat: Entry, model: Entry) -> tuple[Entry, tuple[Preparation, ...]]:
    """Arguments of the model class, and what must be made for them; checked."""
    arguments = dict(flat)
    made: list[Preparation] = []
    quantize, codebook, calibrate = (arguments.pop(key, None) for key in ("quantize", "codebook", "calibrate"))
    intact = str(arguments.get("pivot", "bos")).lower() != "none" and arguments.get("intact", True)
    try:
        if codebook is not None:
            made.append(_codebook(CodebookSpec.model_validate(codebook), model, arguments))
            arguments["kv_codebook"] = MADE + made[-1].name
        if quantize is not None:
            made.append(_quantize(QuantizeSpec.model_validate(quantize), model))
            arguments |= {"pretrained": MADE + made[-1].name, "reference": model["pretrained"]}
        if not intact or pivot_kind(arguments.get("pivot")) == "kv_file":
            arguments.pop("reference", None)
        if calibrate is not None:
            plain = {key: value for key, value in arguments.items() if not key.startswith("kv_")}
            made.append(CalibratePreparation(plain, CalibrateSpec.model_validate(calibrate)))
            arguments = {key: value for key, value in arguments.items() if key not in {"reference", "intact"}}
            arguments["pivot"] = MADE + made[-1].name
        checked_cell(*split_model_args(arguments))
    except (IntactKVError, ValidationError) as error:
        why = readable(error) if isinstance(error, ValidationError) else error
        said = {key: value for key, value in flat.items() if key not in model}
        raise ConfigError(f"cell {said} of {model['pretrained']}: {why}; mend it, or `exclude` the cell") from None
    return arguments, tuple(made)


def _quantize(asked: QuantizeSpec, model: Entry) -> QuantizePreparation:
    if model.get("revision", "main") != "main" or "reference" in model:
        raise ConfigError("quantize: a model at a revision, or with a reference, is no source; name a folder of it")
    made = QuantizePreparation(model, asked)
    made.job()
    return made


def _codebook(asked: CodebookSpec, model: Entry, arguments: Entry) -> CodebookPreparation:
    if arguments.get("kv_scheme") != "pre_rope":
        raise ConfigError("codebook: does nothing without kv_scheme: pre_rope")
    pivot = {key: arguments[key] for key in _OF_PIVOT if key in arguments}
    kv = cell_from_args({key: arguments[key] for key in arguments if key in CELL_KEYS} | {"kv_codebook": MADE}).kv
    return CodebookPreparation(model, pivot, kv.bits, kv.sink_tokens, kv.quantize_pivot, asked)


def _weights(cell: CellSpec) -> str:
    weights = cell.weights
    group = "" if weights.group_size in {None, -1} else f"g{weights.group_size}"
    return "fp" if weights.method == "none" else f"{weights.method} w{weights.bits}{group}"
