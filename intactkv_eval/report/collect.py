"""Runs from disk: lm_eval's results JSON, and the samples beside it, as values.

Only runs of this package's model class have a cell; others are left out and counted. Knows no tables.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from intactkv_eval.config import ActivationSpec, CellSpec
from intactkv_eval.errors import ConfigError

_SPEED_ONLY = {"batch_size", "max_batch_size", "device"}
_NO_SCORES = {"answer_tokens", "cut_answers", "empty_answers"}  # of answers that nobody has judged


@dataclass(frozen=True)
class Identity:
    """Which model answered: the cell, what else was asked of `hf`, and the weights it was made from.

    checkpoint: how `pretrained` itself is quantized (`gptq w4g128`), None where it is in full precision.
    awq_search: the digest of the search result that was applied.
    """

    cell: CellSpec
    hf_arguments: tuple[tuple[str, str], ...] = ()
    source_hash: str | None = None
    checkpoint: str | None = None
    awq_search: str | None = None

    @property
    def is_full_precision(self) -> bool:
        """Nothing is quantized, neither here nor in the checkpoint."""
        return self.checkpoint is None and all(
            (self.cell.weights.method == "none", self.cell.activations.bits == 16, self.cell.kv.bits == 16)
        )


@dataclass(frozen=True)
class Score:
    """A task's main figure in one run.

    settings: all that makes two runs of one task the same measurement, beside the model. values: the metric of each
    document, by its id, where samples were logged; `of_nll` where the figure is exp of their mean.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    settings: Mapping[str, Any]
    values: Mapping[int, float] = field(default_factory=dict)
    of_nll: bool = False

    @property
    def column(self) -> tuple[str, str, str]:
        """What of two scores must be equal for them to stand in one column."""
        return self.task, self.metric, json.dumps(self.settings, sort_keys=True, default=str)


@dataclass(frozen=True)
class Run:
    """One results file: a model, its pivot's tokens, and its scores by task."""

    path: Path
    date: float
    identity: Identity
    pivot_tokens: tuple[int, ...]
    scores: Mapping[str, Score]


def collect(folders: Iterable[Path], leaves: bool = False) -> tuple[list[Run], int]:
    """All runs below the folders (or files), oldest first, and how many results files were not of this package.

    `leaves`: the tasks inside of groups instead of the groups' own figures.
    Raises ConfigError for a path that is missing, holds no results, or a results file that is damaged.
    """
    files: list[Path] = []
    for folder in folders:
        if not folder.exists():
            raise ConfigError(f"{folder}: no such file or folder")
        found = sorted(folder.rglob("results_*.json")) if folder.is_dir() else [folder]
        if not found:
            raise ConfigError(f"{folder}: holds no results_*.json; run lm_eval with --output_path {folder}")
        files += found
    runs = [run for run in (read_run(file, leaves) for file in dict.fromkeys(files)) if run is not None]
    return sorted(runs, key=lambda run: (run.date, str(run.path))), len(set(files)) - len(runs)


def _by_samples(cell: CellSpec, record: Mapping[str, Any]) -> CellSpec:
    """KV levels are what they were calibrated on, not where they lie: a cell and its baseline have a file each."""
    levels = record.get("kv_levels")
    if levels is None:
        return cell
    named = f"{levels['fingerprint']['weight_hash']} {levels['samples']}"
    return cell.model_copy(update={"kv": cell.kv.model_copy(update={"levels": named})})


def read_run(path: Path, leaves: bool = False) -> Run | None:
    """The run of a results file; None where another model class made it. Raises ConfigError for a damaged file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = content["config"].get("intactkv")
        if record is None:
            return None
        asked = {key: value for key, value in record.get("hf_arguments", {}).items() if key not in _SPEED_ONLY}
        identity = Identity(
            cell=_by_samples(CellSpec.model_validate(record["cell"]), record),
            hf_arguments=tuple(sorted(asked.items())),
            source_hash=record.get("source_hash"),
            checkpoint=_checkpoint_label(record),
            awq_search=record.get("awq_search"),
        )
        scores = {score.task: score for score in _scores(path, content, record, leaves)}
        return Run(path, float(content["date"]), identity, tuple(record["pivot_tokens"]), scores)
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError, ValidationError) as error:
        raise ConfigError(f"{path}: not a whole results file of lm_eval ({type(error).__name__}: {error})") from None


def _checkpoint_label(record: Mapping[str, Any]) -> str | None:
    found = record.get("quantization")
    if found is None or "bits" not in found:
        method = found["method"] if found else record.get("quant_method")
        return method and f"{method} checkpoint"
    group = "" if found["group_size"] == -1 else f"g{found['group_size']}"
    flags = [word for word, key in (("sym", "symmetric"), ("act-order", "act_order"), ("mixed", "mixed")) if found[key]]
    said = ActivationSpec.model_validate(found.get("activations") or {})
    rotated = ["rotated"] if found.get("rotation") else []
    job = (found.get("made") or {}).get("job") or {}  # of our own: the method, whatever format holds it
    behind = ((job.get("calibration") or {}).get("pivot") or {}).get("source")
    aware = [f"calibrated behind {PurePath(behind).name}"] if behind else []
    method = job.get("method", found["method"])
    return " ".join([method, f"w{found['bits']}{group}", *flags, *activations_label(said), *rotated, *aware])


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


def _scores(path: Path, content: dict[str, Any], record: dict[str, Any], leaves: bool) -> Iterable[Score]:
    children = content.get("group_subtasks", {})
    shown: set[str] = set()
    for task in _in_order(content["results"], children, leaves):
        figures = {key.partition(",")[0]: value for key, value in content["results"][task].items() if "," in key}
        metric = _main_metric(figures)
        if metric is None or task in shown:
            continue
        shown |= _below(task, children)
        of_nll = metric == "perplexity" and "nll" in figures
        source = "nll" if of_nll else metric
        value, stderr = float(figures[metric]), figures.get(f"{source}_stderr")
        direction = content["higher_is_better"].get(task, {}).get(metric)
        yield Score(
            task=task,
            metric=metric,
            value=value,
            stderr=stderr * (value if of_nll else 1) if isinstance(stderr, int | float) else None,
            higher_is_better=bool(direction if direction is not None else metric in {"acc", "exact_match"}),
            settings=_settings(task, content, record),
            # A perplexity without an nll logs log-likelihoods under its own name: not values of the figure.
            values=_sample_values(path, task, source) if source != "perplexity" else {},
            of_nll=of_nll,
        )


def _main_metric(figures: Mapping[str, Any]) -> str | None:
    """Our perplexity where there is one, else accuracy, else the first that is a number."""
    numbers = [name for name, value in figures.items() if isinstance(value, int | float) and "_stderr" not in name]
    if _NO_SCORES.issuperset(numbers):
        return None
    wanted = ["perplexity"] if "nll" in numbers else []
    return next(
        (name for name in [*wanted, "acc", "exact_match", "word_perplexity", *numbers] if name in numbers), None
    )


def _settings(task: str, content: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    metadata = content.get("configs", {}).get(task, {}).get("metadata") or {}
    limit, template = content["config"].get("limit"), content.get("chat_template_sha")
    return {
        "limit": None if limit is None else float(limit),
        "documents": content.get("n-samples", {}).get(task, {}).get("effective"),
        "num_fewshot": content.get("n-shot", {}).get(task),
        "protocol": metadata.get("protocol"),
        "data": metadata.get("data"),
        "seed": metadata.get("seed"),
        "version": content.get("versions", {}).get(task),
        "gen_kwargs": content["config"].get("gen_kwargs") or None,
        "chat_template": template,
        "system_instruction": content.get("system_instruction_sha"),
        "fewshot_as_multiturn": content.get("fewshot_as_multiturn") if template else None,
        "dtype": record.get("dtype"),
        "lm_eval": record.get("versions", {}).get("lm_eval"),
    }


def _in_order(results: Mapping[str, Any], children: Mapping[str, list[str]], leaves: bool) -> list[str]:
    """Outermost groups first, so that what they hold is left out; or the tasks that hold nothing."""
    inner = {child for listed in children.values() for child in listed}
    if leaves:
        return [task for task in results if not children.get(task)]
    return sorted(results, key=lambda task: (task in inner, not children.get(task), list(results).index(task)))


def _below(task: str, children: Mapping[str, list[str]]) -> set[str]:
    return {name for child in children.get(task, []) for name in ({child} | _below(child, children))}


def samples_of(results: Path, task: str) -> Path:
    """The samples that lm_eval logs beside a results file."""
    return results.with_name(results.name.replace("results_", f"samples_{task}_").removesuffix(".json") + ".jsonl")


def _sample_values(path: Path, task: str, metric: str) -> dict[int, float]:
    """The metric of every logged document; empty where samples were not logged."""
    samples = samples_of(path, task)
    if not samples.is_file():
        return {}
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {int(row["doc_id"]): float(row[metric]) for row in rows if isinstance(row.get(metric), int | float)}
