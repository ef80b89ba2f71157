"""`intactkv bench`: what IntactKV costs, against lm_eval's own `hf` in the same process on the same requests.

No ratio without agreement: in full precision all must give the same log-likelihoods.
"""

import time
from pathlib import Path
from statistics import median
from typing import Any

from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from intactkv_eval.demo import prepare_model
from intactkv_eval.files import cache_folder, shipped_folder
from intactkv_eval.harness.lm import IntactKVLM

_AGREE = 1e-3  # nats, fp32
_TASK = "intactkv_demo_qa"


def scoring(model: str | None, batch_size: int, repeats: int) -> str:
    """The demo's questions, fp32, CPU: median seconds of `hf` with BOS, pivot=none and pivot=bos, taken in turns."""
    folder = model or str(prepare_model(cache_folder() / "demo"))
    common: dict[str, Any] = {"pretrained": folder, "dtype": "float32", "device": "cpu", "batch_size": batch_size}
    models = {
        "hf, add_bos_token=True": HFLM(**common, add_bos_token=True),
        "intactkv, pivot=none": IntactKVLM(**common, pivot="none"),
        "intactkv, pivot=bos": IntactKVLM(**common, pivot="bos"),
    }
    requests = _requests(folder)
    times: dict[str, list[float]] = {name: [] for name in models}
    answers: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, lm in models.items():
            start = time.perf_counter()
            scored = lm.loglikelihood(requests, disable_tqdm=True)
            times[name].append(time.perf_counter() - start)
            answers[name] = [value for value, _ in scored]
    return _table(folder, len(requests), times, answers)


def _table(folder: str, count: int, times: dict[str, list[float]], answers: dict[str, list[float]]) -> str:
    rival = next(iter(times))
    lines = [
        f"{_TASK}: {count} requests, {Path(folder).name}, fp32, CPU, medians of {len(times[rival])} runs",
        "",
        "| model | seconds | times hf's speed | largest difference in log-likelihood |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, seconds in times.items():
        worst = max(abs(one - other) for one, other in zip(answers[name], answers[rival], strict=True))
        ratio = f"{median(times[rival]) / median(seconds):.2f}" if worst < _AGREE else "answers differ"
        lines.append(f"| {name} | {median(seconds):.2f} | {ratio} | {worst:.1e} |")
    return "\n".join(lines)


def _requests(folder: str) -> list[Any]:
    manager = TaskManager(include_path=str(shipped_folder("tasks")), metadata={"pretrained": folder})
    task = manager.load([_TASK])["tasks"][_TASK]
    task.build_all_requests(rank=0, world_size=1)
    return list(task.instances)
