"""Runs from disk: lm_eval's results JSON, and the samples beside it, as values.

Only runs of this package's model class have a cell; others are left out and counted. Knows no tables.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from intactkv_eval.config import CellSpec
from intactkv_eval.errors import ConfigError

_PRIMARY = ("perplexity", "acc", "word_perplexity", "exact_match", "nll")
# What makes two runs of one task the same measurement, beside the cell.
_SETTINGS = ("limit", "num_fewshot", "protocol", "data", "version", "dtype", "lm_eval")


@dataclass(frozen=True)
class Score:
    """A task's main figure in one run. values: the metric of each document, by its id, where samples were logged."""

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    settings: Mapping[str, Any]
    values: Mapping[int, float] = field(default_factory=dict)

    @property
    def protocol(self) -> str | None:
        """The perplexity protocol's or the prompt's name, where the task has one."""
        name = self.settings["protocol"]
        return None if name is None else str(name)


@dataclass(frozen=True)
class Run:
    """One results file: a cell, its pivot's tokens, and its scores by task."""

    path: Path
    date: float
    cell: CellSpec
    pivot_tokens: tuple[int, ...]
    scores: Mapping[str, Score]


def collect(folders: Iterable[Path]) -> tuple[list[Run], int]:
    """All runs below the folders (or files), oldest first, and how many results files were not of this package.

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
    runs = [run for run in map(read_run, dict.fromkeys(files)) if run is not None]
    return sorted(runs, key=lambda run: (run.date, str(run.path))), len(set(files)) - len(runs)


def read_run(path: Path) -> Run | None:
    """The run of a results file; None where another model class made it. Raises ConfigError for a damaged file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        record = content["config"].get("intactkv")
        if record is None:
            return None
        return Run(
            path=path,
            date=float(content["date"]),
            cell=CellSpec.model_validate(record["cell"]),
            pivot_tokens=tuple(record["pivot_tokens"]),
            scores={score.task: score for score in _scores(path, content, record)},
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError, ValidationError) as error:
        raise ConfigError(f"{path}: not a whole results file of lm_eval ({type(error).__name__}: {error})") from None


def _scores(path: Path, content: dict[str, Any], record: dict[str, Any]) -> Iterable[Score]:
    children = content.get("group_subtasks", {})
    shown: set[str] = set()
    for task in _outermost_first(content["results"], children):
        figures = {key.partition(",")[0]: value for key, value in content["results"][task].items() if "," in key}
        metric = next((name for name in _PRIMARY if name in figures), None)
        if metric is None or task in shown:
            continue
        shown |= _below(task, children)
        source = "nll" if metric == "perplexity" and "nll" in figures else metric
        stderr = figures.get(f"{source}_stderr")
        value = float(figures[metric])
        if not isinstance(stderr, int | float):
            stderr = None
        elif source == "nll":
            stderr = value * stderr if metric == "perplexity" else stderr
        direction = content["higher_is_better"].get(task, {}).get(metric)
        yield Score(
            task=task,
            metric=metric,
            value=value,
            stderr=stderr,
            higher_is_better=bool(direction if direction is not None else metric in {"acc", "exact_match"}),
            settings=_settings(task, content, record),
            values=_sample_values(path, task, source),
        )


def _settings(task: str, content: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    metadata = content.get("configs", {}).get(task, {}).get("metadata") or {}
    found = {
        "limit": content["config"].get("limit"),
        "num_fewshot": content.get("n-shot", {}).get(task),
        "protocol": metadata.get("protocol"),
        "data": metadata.get("data"),
        "version": content.get("versions", {}).get(task),
        "dtype": record.get("dtype"),
        "lm_eval": record.get("versions", {}).get("lm_eval"),
    }
    return {key: found[key] for key in _SETTINGS}


def _outermost_first(results: Mapping[str, Any], children: Mapping[str, list[str]]) -> list[str]:
    inner = {child for listed in children.values() for child in listed}
    return sorted(results, key=lambda task: (task in inner, task not in children, list(results).index(task)))


def _below(task: str, children: Mapping[str, list[str]]) -> set[str]:
    return {name for child in children.get(task, []) for name in ({child} | _below(child, children))}


def _sample_values(path: Path, task: str, metric: str) -> dict[int, float]:
    """The metric of every logged document; empty where samples were not logged."""
    samples = path.with_name(path.name.replace("results_", f"samples_{task}_").removesuffix(".json") + ".jsonl")
    if not samples.is_file():
        return {}
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    return {int(row["doc_id"]): float(row[metric]) for row in rows if isinstance(row.get(metric), int | float)}
