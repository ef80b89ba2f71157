"""A large folder of results: `intactkv report`'s reading and comparing, against json.loads of the same files.

The files are like those that lm_eval writes, without samples: cells of several models, quantized and not, behind the
intact pivot, as its baseline and in full precision, and tasks of which every figure is its own. The gate: every intact
run of a quantized model has the baseline, and the full-precision run, that it was made with.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect
from intactkv_eval.report.grid import Grid, grid_of

_LONE = 5
_BITS, _KV = (2, 3, 4, 8), (16, 8, 4, 3, 2)
_PROMPT = "The following are multiple choice questions about {{subject}}.\n\n{{question}}\nAnswer:"


def report(files: int, repeats: int, tasks: int = 20) -> str:
    """A markdown table: seconds, files a second, and the time as a multiple of json.loads'.

    Raises ConfigError where a comparison is missing, or one was made that has no partner.
    """
    times: dict[str, list[float]] = {"json.loads of each": [], "reading": [], "comparing": []}
    with tempfile.TemporaryDirectory(prefix="intactkv-bench-") as name:
        folder = Path(name)
        size = write_results(folder, files, tasks)
        for _ in range(repeats):
            begun = time.perf_counter()
            for path in sorted(folder.rglob("results_*.json")):
                json.loads(path.read_bytes())
            plain = time.perf_counter()
            runs, _ = collect([folder])
            read = time.perf_counter()
            grid = grid_of(runs)
            done = time.perf_counter()
            for key, seconds in zip(times, (plain - begun, read - plain, done - read), strict=True):
                times[key].append(seconds)
    _check(grid)
    return _table(times, files, tasks, size)


def write_results(folder: Path, files: int, tasks: int) -> int:
    """Results files below `folder`, each of another cell; their size in bytes."""
    draw, size = Random(0), 0
    for number, cell in zip(range(files), _cells(), strict=False):
        path = folder / f"{number // 100:04d}" / f"results_{number:06d}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        size += path.write_text(json.dumps(_content(number, cell, tasks, draw)), encoding="utf-8")
    return size


def _cells() -> Iterator[dict[str, Any]]:
    """Each model in full precision, then all its quantized cells, as baseline and behind the intact pivot.

    Every fifth model has no baselines: the report then looks for the nearest run, and says what differs.
    """
    model = 0
    while True:
        name = f"model-{model:04d}"
        plain = [(None, 16)] + [(bits, kv) for bits in _BITS for kv in _KV]
        for bits, kv in plain:
            for intact in (False,) if bits is None else (True,) if model % _LONE == _LONE - 1 else (False, True):
                weights = {"method": "rtn", "bits": bits, "group_size": 64} if bits else {}
                yield {
                    "model": {"pretrained": name, "dtype": "bfloat16"},
                    "weights": weights,
                    "kv": {"bits": kv},
                    "pivot": {"intact": intact},
                }
        model += 1


def _content(number: int, cell: dict[str, Any], tasks: int, draw: Random) -> dict[str, Any]:
    """What lm_eval writes of one run."""
    names = [f"task_{task:02d}" for task in range(tasks)]
    record = {
        "format": RECORD_FORMAT,
        "cell": cell,
        "dtype": "bfloat16",
        "hf_arguments": {},
        "pivot_tokens": [1],
        "source_hash": cell["model"]["pretrained"],
        "versions": {"intactkv_eval": "0.1.0", "lm_eval": "0.4.13"},
    }
    return {
        "results": {task: {"alias": task, "acc,none": draw.random(), "acc_stderr,none": 0.01} for task in names},
        "group_subtasks": {task: [] for task in names},
        "configs": {
            task: {"task": task, "doc_to_text": _PROMPT, "description": _PROMPT, "metadata": {"version": 1.0},
                   "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
                   "output_type": "multiple_choice", "num_fewshot": 5}
            for task in names
        },
        "versions": dict.fromkeys(names, 1.0),
        "n-shot": dict.fromkeys(names, 5),
        "higher_is_better": {task: {"acc": True} for task in names},
        "n-samples": {task: {"original": 1000, "effective": 1000} for task in names},
        "task_hashes": {task: f"{place:064x}" for place, task in enumerate(names)},
        "config": {"model": "intactkv", "limit": None, "fewshot_seed": 1234, "torch_seed": 1234, "intactkv": record},
        "date": 1.8e9 + number,
    }  # fmt: skip


def _check(grid: Grid) -> None:
    for row in grid.rows:
        cell = row.identity.cell
        is_lone = int(cell.model.pretrained.rpartition("-")[2]) % _LONE == _LONE - 1
        for entry in row.entries.values():
            found = entry.found
            has_baseline, has_full = found.to_baseline is not None, found.to_full_precision is not None
            is_right = has_baseline == (cell.pivot.intact and not is_lone) == (cell.pivot.intact and not entry.unpaired)
            if not is_right or has_full == row.identity.is_full_precision:
                raise ConfigError(f"{', '.join(row.labels)}: compared with a run that is not its partner: report it")


def _table(times: dict[str, list[float]], files: int, tasks: int, size: int) -> str:
    repeats = len(times["reading"])
    lines = [
        f"{files} results files of {tasks} tasks, {size / 1e6:.0f} MB, no samples, one process, medians of {repeats} "
        "runs; every comparison checked",
        "",
        "| work | seconds | files/s | times json.loads |",
        "| --- | ---: | ---: | ---: |",
    ]
    middle = {name: median(seconds) for name, seconds in times.items()}
    plain = middle["json.loads of each"]
    for name, seconds in {**middle, "both": middle["reading"] + middle["comparing"]}.items():
        lines.append(f"| {name} | {seconds:.1f} | {files / seconds:.0f} | {seconds / plain:.1f} |")
    return "\n".join(lines)
