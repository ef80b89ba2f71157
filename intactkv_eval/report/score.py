"""A task's main figure in one run, as lm_eval's results hold it, with the values of its documents. Knows no models."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, inf, isclose, isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from intactkv_eval.report.clusters import KEY
from intactkv_eval.report.groups import TaskGroups
from intactkv_eval.report.incomplete import judge_settings, paired_figures
from intactkv_eval.report.samples import read_samples
from intactkv_eval.report.settings import SharedSettings, text_of

_NO_SCORES = {"answer_tokens", "cut_answers", "empty_answers",  # of answers that nobody has judged
              "bypass"}  # lm_eval's, of --predict_only  # fmt: skip
# What metadata of our tasks changes their requests by; the rest of it are the model's arguments.
_SHAPING = ("max_prompt_tokens", "max_windows", "num_choices", "ppl_window")
_SAME = 1e-6
Document = tuple[str, int]


@dataclass(frozen=True)
class Score:
    """A task's main figure in one run.

    task: its name; with the filter where answers were read by several (`gsm8k [strict-match]`). settings: all that
    makes two runs of one task the same measurement, beside the model. documents: SHA-256 over them and their prompts,
    None where samples were not logged. drawn: the seed of the few-shot examples. values: the metric of each document,
    by its task and id, as far as they were logged and make up the figure: their mean, exp of it where `of_nll`, or the
    sum of `weights` times their tasks' means where there are some. spread: standard deviation over seeds, where this is
    the mean of several. clusters: which documents belong together, as far as any do; cluster_field: by what.
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
    drawn: int | None = None
    spread: float | None = None
    clusters: Mapping[Document, str] = field(default_factory=dict)
    cluster_field: str = ""

    @cached_property
    def column(self) -> tuple[str, str, str]:
        """What of two scores must be equal for them to stand in one column."""
        return self.task, self.metric, text_of(self.settings)


def read_scores(
    path: Path, content: dict[str, Any], record: dict[str, Any], leaves: bool, shared: SharedSettings | None = None
) -> Iterable[Score]:
    """The main figure of each task and filter, of groups instead of what they hold unless `leaves`.

    shared: settings that equal those of other files, as one object.
    """
    children = content.get("group_subtasks", {})
    shared, groups = shared or SharedSettings(), TaskGroups(children)
    named = _without_groups(content["results"])
    shown: set[str] = set()
    for task in _in_order(content["results"], children, leaves):
        by_filter = _by_filter(content["results"][task])
        if not by_filter or task in shown:
            continue
        groups.add_below(task, shown)
        inside = groups.leaves(task)
        settings = shared.of(_settings(task, content, record, inside))
        drawn = content["config"].get("fewshot_seed") if settings["num_fewshot"] else None
        for name, (metric, figures) in by_filter.items():
            score = _score(path, content, task, inside, metric, figures, name if len(by_filter) > 1 else None)
            yield replace(score, task=score.task.replace(task, named[task], 1), settings=settings, drawn=drawn)


def _without_groups(tasks: Iterable[str]) -> dict[str, str]:
    """Each task by its own name, which lm_eval 0.5.0 writes behind its group's (`mmlu::anatomy`).

    A name that two groups hold stays whole, since their settings may differ.
    """
    short = {task: task.rpartition("::")[2] for task in tasks}
    count = Counter(short.values())
    return {task: name if count[name] == 1 else task for task, name in short.items()}


def _score(
    path: Path,
    content: dict[str, Any],
    task: str,
    leaves: list[str],
    metric: str,
    figures: Mapping[str, Any],
    name: str | None,
) -> Score:
    """Without its settings. leaves: whose documents it is of. name: of the filter, where there are several."""
    figures = paired_figures(figures)
    of_nll = metric == "perplexity" and "nll" in figures
    source = "nll" if of_nll else metric
    value, stderr = float(figures[metric]), finite(figures.get(f"{source}_stderr"))
    made = float(figures[source])
    # A perplexity without an nll logs log-likelihoods under its own name: not values of the figure.
    whole = source != "perplexity" and (not of_nll or isclose(value, _exp(made), rel_tol=_SAME))
    short = _without_groups(leaves)
    samples = {short[leaf]: read_samples(path, leaf, source, name, _named_cluster(content, leaf))
               for leaf in leaves if whole}  # fmt: skip
    values, weights = _values({leaf: one.values for leaf, one in samples.items()}, made) if whole else ({}, {})
    fields = sorted({one.clusters.field for one in samples.values()} - {""})
    direction = content["higher_is_better"].get(task, {}).get(metric)
    return Score(
        task=task if name is None else f"{task} [{name}]",
        metric=metric,
        value=value,
        stderr=None if stderr is None else stderr * (value if of_nll else 1),
        higher_is_better=bool(direction if direction is not None else metric in {"acc", "exact_match"}),
        settings={},
        values=values,
        of_nll=of_nll,
        weights=weights,
        documents=_documents(content, leaves),
        clusters={
            (leaf, place): f"{leaf} {of}" for leaf, one in samples.items() for place, of in one.clusters.of.items()
        },
        cluster_field=", ".join(fields),
    )


def _named_cluster(content: Mapping[str, Any], leaf: str) -> Any:
    return (content.get("configs", {}).get(leaf, {}).get("metadata") or {}).get(KEY)


def _by_filter(found: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The main metric and all figures by what read the answers, in lm_eval's order, as far as there is a main one."""
    filters: dict[str, dict[str, Any]] = {}
    for key, value in found.items():
        name, comma, used = key.partition(",")
        if comma:
            filters.setdefault(used, {})[name] = value
    main = {used: _main_metric(figures) for used, figures in filters.items()}
    return {used: (metric, filters[used]) for used, metric in main.items() if metric is not None}


def finite(value: Any) -> float | None:
    """None for what is no number, NaN and infinity among it: an error that is not known."""
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def _exp(value: float) -> float:
    try:
        return exp(value)
    except OverflowError:
        return inf


def _main_metric(figures: Mapping[str, Any]) -> str | None:
    """Our perplexity where there is one, else accuracy, else the first that is a number."""
    numbers = [name for name, value in figures.items() if isinstance(value, int | float) and "_stderr" not in name]
    if _NO_SCORES.issuperset(numbers):
        return None
    wanted = ["perplexity"] if "nll" in numbers else []
    return next(
        (name for name in [*wanted, "acc", "exact_match", "word_perplexity", *numbers] if name in numbers), None
    )


def _settings(task: str, content: dict[str, Any], record: dict[str, Any], leaves: list[str]) -> dict[str, Any]:
    """leaves: the tasks of a group, which itself has no settings."""
    configs = content.get("configs", {})
    metadata = configs.get(task, {}).get("metadata") or {}
    limit, template = content["config"].get("limit"), content.get("chat_template_sha")
    counts = [content.get("n-samples", {}).get(leaf, {}).get("effective") for leaf in leaves]
    shaping = {
        key: _shared((configs.get(leaf, {}).get("metadata") or {}).get(key) for leaf in leaves) for key in _SHAPING
    }
    return {
        "limit": None if limit is None else float(limit),
        "documents": sum(counts) if all(isinstance(count, int) for count in counts) else None,
        "num_fewshot": _shared(content.get("n-shot", {}).get(leaf) for leaf in leaves),
        "protocol": metadata.get("protocol"),
        "data": metadata.get("data"),
        "seed": metadata.get("seed"),
        "sampling_seed": content["config"].get("torch_seed") if _is_sampled(task, content) else None,
        "version": _version(content.get("versions", {}), [task, *leaves]),
        "gen_kwargs": content["config"].get("gen_kwargs") or None,
        "chat_template": template,
        "chat_date": record.get("chat_date") if template or metadata.get("bench") else None,
        "system_instruction": content.get("system_instruction_sha"),
        "fewshot_as_multiturn": content.get("fewshot_as_multiturn") if template else None,
        "dtype": record.get("dtype"),
        "lm_eval": record.get("versions", {}).get("lm_eval"),
        **shaping,
        **judge_settings(metadata),
    }


def _shared(values: Iterable[Any]) -> Any:
    """What all have, or each of what they have."""
    found = list(dict.fromkeys(map(_plain, values)))
    return found[0] if len(found) == 1 else sorted(map(str, found))


def _version(versions: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """The version that a group and all of its tasks have, or each one's: a group keeps its own where a task changes."""
    found = {task: _plain(versions.get(task)) for task in tasks}
    alike = set(found.values())
    return alike.pop() if len(alike) == 1 else [f"{task} {version}" for task, version in found.items()]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, int | float | str) else str(value)


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
    return sorted(results, key=lambda task: (task in inner, not children.get(task)))


def _values(parts: Mapping[str, Mapping[int, float]], figure: float) -> tuple[dict[Document, float], dict[str, float]]:
    """The values that make up a figure, and the weights of their tasks: a group's are of documents, or of tasks, alike.

    parts: the values of each task. Which of the two, the figure itself tells; one that is made otherwise (a median), or
    not logged whole, or beside which the samples of another run lie, has none.
    """
    if not all(parts.values()):
        return {}, {}
    values = {(leaf, place): value for leaf, part in parts.items() for place, value in part.items()}
    if isclose(fmean(values.values()), figure, rel_tol=_SAME, abs_tol=_SAME):
        return values, {}
    if isclose(fmean(fmean(part.values()) for part in parts.values()), figure, rel_tol=_SAME, abs_tol=_SAME):
        return values, {leaf: 1 / len(parts) for leaf in parts}
    return {}, {}


def _documents(content: Mapping[str, Any], leaves: list[str]) -> str | None:
    hashes = content.get("task_hashes") or {}
    found = [hashes.get(leaf) for leaf in leaves]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest() if all(found) else None
