"""Runs from disk: lm_eval's results JSON, and the samples beside it, as values.

Only runs of this package's model class have a cell; others are left out and counted. Knows no tables.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from intactkv_eval.cell.formulas import formulas_of_checkpoint, names_of_cell, recorded, stale
from intactkv_eval.cell.records import SPEED_ONLY, check_format
from intactkv_eval.cell.spec import ActivationSpec, CellSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.memory import without_collector
from intactkv_eval.report.pairing import with_own_error
from intactkv_eval.report.planned import files_below
from intactkv_eval.report.score import Score, read_scores
from intactkv_eval.report.settings import SharedSettings
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.limits import read_bytes


@dataclass(frozen=True)
class Identity:
    """Which model answered: the cell, what else was asked of `hf`, and the weights it was made from.

    checkpoint: how `pretrained` itself is quantized (`gptq w4g128`), None where it is in full precision.
    awq_search: the digest of the search result that was applied. symmetric_formula: whose formula made the symmetric
    weights of the cell itself, None where it has none. made_from: the model that a checkpoint of ours is of,
    job: how it was made, but for `behind`: the pivot that it was calibrated behind. formulas: those that decided its
    figures, with the revisions that the run recorded.
    """

    cell: CellSpec
    hf_arguments: tuple[tuple[str, str], ...] = ()
    source_hash: str | None = None
    checkpoint: str | None = None
    awq_search: str | None = None
    symmetric_formula: str | None = None
    made_from: str | None = None
    job: str | None = None
    behind: str | None = None
    formulas: tuple[tuple[str, int], ...] = ()

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Made once: every figure of a report is looked up by its identity."""
        return hash(tuple(getattr(self, one.name) for one in fields(self)))

    def without_hash(self) -> "Identity":
        """Whatever weights it is of."""
        return replace(self, source_hash=None)

    @property
    def stale(self) -> list[str]:
        """The formulas whose revision is no longer today's, each as a phrase."""
        return stale(dict(self.formulas))

    @property
    def is_full_precision(self) -> bool:
        """Nothing is quantized, neither here nor in the checkpoint."""
        return self.checkpoint is None and all(
            (self.cell.weights.method == "none", self.cell.activations.bits == 16, self.cell.kv.bits == 16)
        )


@dataclass(frozen=True)
class Run:
    """One results file: a model, its pivot's tokens, and its scores by task. rows: a hash of what an intact pivot's KV
    was made of, which its file's name does not tell."""

    path: Path
    date: float
    identity: Identity
    pivot_tokens: tuple[int, ...]
    scores: Mapping[str, Score]
    rows: str | None = None


@without_collector()
def collect(folders: Iterable[Path], leaves: bool = False) -> tuple[list[Run], int]:
    """All runs below the folders (or files), oldest first, and how many results files were not of this package.

    `leaves`: the tasks inside of groups instead of the groups' own figures.
    Raises ConfigError for a path that is missing, holds no results, or a results file that is damaged.
    """
    files: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"{folder}: no such file or folder")
        found = files_below(folder) if folder.is_dir() else [folder]
        if not found:
            raise ConfigError(f"{folder}: holds no results_*.json; run lm_eval with --output_path {folder}")
        files += found
    known: dict[Identity, Identity] = {}
    shared = SharedSettings()
    runs = []
    for file in dict.fromkeys(files):
        run = read_run(file, leaves, shared)
        if run is not None:
            runs.append(replace(run, identity=known.setdefault(run.identity, run.identity)))
    return sorted(runs, key=lambda run: (run.date, str(run.path))), len(set(files)) - len(runs)


def identity_of(record: Mapping[str, Any]) -> Identity:
    """Of what a run records of its cell. Raises KeyError, TypeError or ValidationError where it is damaged."""
    asked = {key: str(value) for key, value in record.get("hf_arguments", {}).items() if key not in SPEED_ONLY}
    cell = _by_samples(CellSpec.model_validate(record["cell"]), record)
    # A date that was chosen is like one that was not: which it is stands among the scores' settings.
    cell = cell.model_copy(update={"pivot": cell.pivot.model_copy(update={"chat_date": None})})
    ours = (record.get("quantization") or {}).get("made") or {}
    made, job = ours.get("source") or {}, ours.get("job") or {}
    if made:  # known by its weights' hash, wherever it lies
        model = cell.model.model_copy(update={"pretrained": PurePath(cell.model.pretrained).name})
        cell = cell.model_copy(update={"model": model})
    return Identity(
        cell=cell,
        hf_arguments=tuple(sorted(asked.items())),
        source_hash=_text(record.get("source_hash")),
        checkpoint=_checkpoint_label(record),
        awq_search=_text(record.get("awq_search")),
        symmetric_formula=_formula(record, cell.weights.symmetric),
        made_from=_text(made.get("model")),
        job=_plain_job(job, made.get("dtype")) if job else None,
        behind=_behind(job),
        formulas=_formulas(cell, record, ours),
    )


def _formulas(cell: CellSpec, record: Mapping[str, Any], made: Mapping[str, Any]) -> tuple[tuple[str, int], ...]:
    """Runs from before revisions were recorded used revision 1 of every formula."""
    is_calibrated = bool((record.get("pivot_fingerprint") or {}).get("calibrated"))
    own = recorded(names_of_cell(cell, is_calibrated), record.get("formulas"))
    return tuple(sorted({**own, **formulas_of_checkpoint(made)}.items()))


def _text(value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"expected a text, found {str(value)[:80]}")
    return value


def _by_samples(cell: CellSpec, record: Mapping[str, Any]) -> CellSpec:
    """A KV codebook is what it was calibrated on, not where it lies: a cell and its baseline have a file each."""
    codebook = record.get("kv_codebook")
    if codebook is None:
        return cell
    named = f"{codebook['fingerprint']['weight_hash']} {codebook['samples']}"
    return cell.model_copy(update={"kv": cell.kv.model_copy(update={"codebook": named})})


def read_run(path: Path, leaves: bool = False, shared: SharedSettings | None = None) -> Run | None:
    """The run of a results file; None where another model class made it. Raises ConfigError for a damaged file.

    shared: the settings of the files that were read before, of which equal ones are not made anew.
    """
    try:
        content = parse_json(read_bytes(path))
        record = content["config"].get("intactkv")
        if record is None:
            return None
        check_format(record, path)
        identity = identity_of(record)
        scores = {score.task: with_own_error(score) for score in read_scores(path, content, record, leaves, shared)}
        date, tokens = float(content["date"]), tuple(int(token) for token in record["pivot_tokens"])
        if not isfinite(date):
            raise ValueError(f"date {date}")
        return Run(path, date, identity, tokens, scores, _rows(record))
    except (OSError, KeyError, TypeError, AttributeError, ValueError, OverflowError, ValidationError) as error:
        raise ConfigError(f"{path}: not a whole results file of lm_eval ({type(error).__name__}: {error})") from None


def _rows(record: Mapping[str, Any]) -> str | None:
    found = record.get("pivot_fingerprint")
    if found is None:
        return None
    said = json.dumps([found.get(key) for key in ("weight_hash", "basis", "calibrated")], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:8]


def _checkpoint_label(record: Mapping[str, Any]) -> str | None:
    found = record.get("quantization")
    if found is None or "bits" not in found:
        method = found["method"] if found else record.get("quant_method")
        return method and f"{method} checkpoint"
    group = "" if found["group_size"] == -1 else f"g{found['group_size']}"
    said = ActivationSpec.model_validate(found.get("activations") or {})
    rotated = ["rotated"] if found.get("rotation") else []
    job = (found.get("made") or {}).get("job") or {}  # of our own: the method, whatever format holds it
    flags = symmetric_label(_formula(job, found["symmetric"]))
    ordered = "act-order static groups" if found.get("static_groups") else "act-order"
    flags += [word for word, key in ((ordered, "act_order"), ("mixed", "mixed")) if found[key]]
    behind = _behind(job)
    aware = [f"calibrated behind {behind}"] if behind else []
    method = job.get("method", found["method"])
    return " ".join([method, f"w{found['bits']}{group}", *flags, *activations_label(said), *rotated, *aware])


def _formula(record: Mapping[str, Any], symmetric: bool) -> str | None:
    """Whose formula made symmetric weights. Records that do not name one are older than the choice: all were GPTQ's."""
    return (_text(record.get("symmetric_formula")) or "gptq") if symmetric else None


def symmetric_label(formula: str | None) -> list[str]:
    """`sym` for weights by GPTQ's formula, `sym-quarot` for those by another's; nothing for asymmetric ones."""
    if formula is None:
        return []
    return ["sym" if formula == "gptq" else f"sym-{formula}"]


def _behind(job: Mapping[str, Any]) -> str | None:
    source = ((job.get("calibration") or {}).get("pivot") or {}).get("source")
    return PurePath(source).name if source else None


def _plain_job(job: Mapping[str, Any], dtype: Any) -> str:
    """The job but for its pivot. dtype: that of the model that it was done on."""
    calibration = {key: value for key, value in (job.get("calibration") or {}).items() if key != "pivot"}
    return json.dumps({**job, "calibration": calibration, "dtype": dtype}, sort_keys=True)


def activations_label(spec: ActivationSpec) -> list[str]:
    """`a4`, and what of it is not the default; nothing where they are not quantized."""
    if spec.bits == 16:
        return []
    clip = [f"clip {spec.clip:g}"] if spec.clip < 1 else []
    return [
        f"a{spec.bits}",
        *(["static"] if spec.scheme == "tensor" else []),
        *([] if spec.symmetric else ["asym"]),
        *clip,
    ]
