"""A task's main figure in one run, as lm_eval's results hold it, with the values of its documents. Knows no models."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from statistics import fmean
from typing import Any

from intactkv_eval.files import read_jsonl

_NO_SCORES = {"answer_tokens", "cut_answers", "empty_answers"}  # of answers that nobody has judged
_SAME = 1e-6
Document = tuple[str, int]


@dataclass(frozen=True)
class Score:
    """A task's main figure in one run.

    settings: all that makes two runs of one task the same measurement, beside the model. documents: SHA-256 over them
    and their prompts, None where samples were not logged. values: the metric of each document, by its task and id, as
    far as they were logged and make up the figure: their mean, exp of it where `of_nll`, or the sum of `weights` times
    their tasks' means where there are some. spread: standard deviation over seeds, where this is the mean of several.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    settings: Mapping[str, Any]
    values: Mapping[Document, float] = field(default_factory=dict)
    of_nll: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)
    documents: str | None = None
    spread: float | None = None

    @property
    def column(self) -> tuple[str, str, str]:
        """What of two scores must be equal for them to stand in one column."""
        return self.task, self.metric, json.dumps(self.settings, sort_keys=True, default=str)


def read_scores(path: Path, content: dict[str, Any], record: dict[str, Any], leaves: bool) -> Iterable[Score]:
    """The main figure of each task, of groups instead of what they hold unless `leaves`."""
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
        # A perplexity without an nll logs log-likelihoods under its own name: not values of the figure.
        values, weights = _values(path, task, source, value, children) if source != "perplexity" else ({}, {})
        direction = content["higher_is_better"].get(task, {}).get(metric)
        yield Score(
            task=task,
            metric=metric,
            value=value,
            stderr=stderr * (value if of_nll else 1) if isinstance(stderr, int | float) else None,
            higher_is_better=bool(direction if direction is not None else metric in {"acc", "exact_match"}),
            settings=_settings(task, content, record),
            values=values,
            of_nll=of_nll,
            weights=weights,
            documents=_documents(content, task, children),
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
        "sampling_seed": content["config"].get("torch_seed") if _is_sampled(task, content) else None,
        "version": content.get("versions", {}).get(task),
        "gen_kwargs": content["config"].get("gen_kwargs") or None,
        "chat_template": template,
        "system_instruction": content.get("system_instruction_sha"),
        "fewshot_as_multiturn": content.get("fewshot_as_multiturn") if template else None,
        "dtype": record.get("dtype"),
        "lm_eval": record.get("versions", {}).get("lm_eval"),
    }


def _is_sampled(task: str, content: Mapping[str, Any]) -> bool:
    """Whether answers were drawn by torch's own numbers."""
    asked = content["config"].get("gen_kwargs")
    kwargs = content.get("configs", {}).get(task, {}).get("generation_kwargs")
    said = {**(kwargs if isinstance(kwargs, dict) else {}), **(asked if isinstance(asked, dict) else {})}
    return bool(said.get("do_sample"))


def _in_order(results: Mapping[str, Any], children: Mapping[str, list[str]], leaves: bool) -> list[str]:
    """Outermost groups first, so that what they hold is left out; or the tasks that hold nothing."""
    inner = {child for listed in children.values() for child in listed}
    if leaves:
        return [task for task in results if not children.get(task)]
    return sorted(results, key=lambda task: (task in inner, not children.get(task), list(results).index(task)))


def _below(task: str, children: Mapping[str, list[str]]) -> set[str]:
    """What a group holds, and what those hold; a file may name a group inside of itself."""
    found: set[str] = set()
    left = list(children.get(task, []))
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += children.get(name, [])
    return found


def samples_of(results: Path, task: str) -> Path:
    """The samples that lm_eval logs beside a results file."""
    return results.with_name(results.name.replace("results_", f"samples_{task}_").removesuffix(".json") + ".jsonl")


def _values(
    path: Path, task: str, metric: str, figure: float, children: Mapping[str, list[str]]
) -> tuple[dict[Document, float], dict[str, float]]:
    """The values that make up a figure, and the weights of their tasks: a group's are of documents, or of tasks, alike.

    Which of the two, the figure itself tells; a group made otherwise, or not logged whole, has none.
    """
    tasks = _leaves(task, children)
    parts = {leaf: _sample_values(path, leaf, metric) for leaf in tasks}
    if not all(parts.values()):
        return {}, {}
    values = {(leaf, place): value for leaf, part in parts.items() for place, value in part.items()}
    if len(tasks) == 1 or isclose(fmean(values.values()), figure, rel_tol=_SAME):
        return values, {}
    if isclose(fmean(fmean(part.values()) for part in parts.values()), figure, rel_tol=_SAME):
        return values, {leaf: 1 / len(tasks) for leaf in tasks}
    return {}, {}


def _leaves(task: str, children: Mapping[str, list[str]]) -> list[str]:
    return sorted(name for name in _below(task, children) if not children.get(name)) or [task]


def _documents(content: Mapping[str, Any], task: str, children: Mapping[str, list[str]]) -> str | None:
    hashes = content.get("task_hashes") or {}
    found = [hashes.get(leaf) for leaf in _leaves(task, children)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if all(found) else None


def _sample_values(path: Path, task: str, metric: str) -> dict[int, float]:
    """The metric of every logged document; empty where samples were not logged."""
    samples = samples_of(path, task)
    if not samples.is_file():
        return {}
    rows = read_jsonl(samples)
    return {int(row["doc_id"]): float(row[metric]) for row in rows if isinstance(row.get(metric), int | float)}
