"""The samples that lm_eval logs beside a results file: a task's figure of every document, and which belong together."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intactkv_eval.report.clusters import Clusters, clusters_of
from intactkv_eval.storage.files import read_jsonl


@dataclass(frozen=True)
class LoggedSamples:
    """values: the metric of each document, by its `doc_id`."""

    values: Mapping[int, float]
    clusters: Clusters


def samples_of(results: Path, task: str) -> Path:
    """The samples that lm_eval logs beside a results file."""
    return results.with_name(results.name.replace("results_", f"samples_{task}_").removesuffix(".json") + ".jsonl")


def read_samples(results: Path, task: str, metric: str, name: str | None, cluster: Any = None) -> LoggedSamples:
    """Every logged document as the filter `name` read it; nothing where samples were not logged.

    cluster: the field that joins documents, as the task's metadata names it.

    Raises ValueError for an id that is none, or comes twice (another run's lines behind this one's), and for a cluster
    that documents do not have.
    """
    if not _is_there(results, task):
        return LoggedSamples({}, clusters_of([], cluster))
    path = samples_of(results, task)
    values: dict[int, float] = {}
    rows = []
    for row in read_jsonl(path):
        if not isinstance(row.get(metric), int | float) or (name is not None and row.get("filter") != name):
            continue
        place = row["doc_id"]
        if not isinstance(place, int) or place in values:
            raise ValueError(f"{path.name}: doc_id {str(place)[:80]} is no number, or comes twice")
        values[place] = float(row[metric])
        rows.append(row)
    return LoggedSamples(values, clusters_of(rows, cluster))


def _is_there(results: Path, task: str) -> bool:
    """Whether samples were logged. Most tasks of a large folder have none, and a path is slow to make."""
    if os.sep in task:
        return samples_of(results, task).is_file()  # refuses the name
    name = results.name.replace("results_", f"samples_{task}_").removesuffix(".json") + ".jsonl"
    return os.path.isfile(os.path.join(results.parent, name))
