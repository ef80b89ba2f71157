"""Log-likelihood tasks against lm_eval's own `hf` in the same process, on the same requests, turn by turn.

`hf` runs at its own fastest batch size of those asked for; the bound is what sharing prefixes alone would give, tokens
that `hf` computes over tokens that we compute. No ratio without agreement.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from intactkv_eval.compat.lm_eval_api import HFLM, TaskManager
from intactkv_eval.demo import prepare_model
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.storage.files import cache_folder, shipped_folder

DEMO_TASK = "intactkv_demo_qa"
_AGREE = 1e-3  # nats, fp32, for each request
# 16 bits, RMS over all requests: relative, or in nats the step of a bf16 logit between 16 and 32.
_AGREE_16_BITS, _STEP_16_BITS = 2e-2, 0.125
_TRIED = 0.1  # of the requests, to find hf's fastest batch size


@dataclass
class _Rival:
    lm: Any
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    answers: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)


class CountingHF(HFLM):
    """`hf`, counting the tokens that its model is given."""

    tokens = 0

    def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
        self.tokens += inps.numel()
        return super()._model_call(inps, *args, **kwargs)


def scoring(
    model: str | None, tasks: list[str], batch_sizes: list[int], repeats: int, dtypes: list[str], limit: int | None
) -> str:
    """A markdown table for each dtype: seconds, tokens, times hf's speed, its bound, and the largest difference.

    Raises ConfigError for a task that is unknown or asks for something else than log-likelihoods.
    """
    folder = model or str(prepare_model(cache_folder() / "demo"))
    lines = [
        f"{Path(folder).name}, CPU, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {repeats} "
        "runs in turns; seconds of the whole call, tokenization included",
        "",
        "| task | dtype | requests | model | rows a batch | seconds | tokens | times hf's speed | bound by tokens | "
        "largest difference |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dtype in dtypes:
        common: dict[str, Any] = {"pretrained": folder, "dtype": dtype, "device": "cpu"}
        hf = CountingHF(**common, add_bos_token=True)
        ours = {pivot: IntactKVLM(**common, pivot=pivot) for pivot in ("none", "bos")}
        for task in tasks:
            requests = _requests(folder, task, limit)
            size = _fastest(hf, requests, batch_sizes)
            rivals = {"hf": _Rival(hf), **{f"pivot={pivot}": _Rival(lm) for pivot, lm in ours.items()}}
            for rival in rivals.values():
                rival.lm.batch_size_per_gpu = size
            for turn in range(repeats):
                for rival in rivals.values():
                    _run(rival, requests)
                    print(f"{task} {dtype} run {turn + 1}: {rival.seconds[-1]:.1f} s", flush=True)
            lines += [_line(task, dtype, size, name, rival, rivals["hf"]) for name, rival in rivals.items()]
    return "\n".join(lines)


def _run(rival: _Rival, requests: list[Any]) -> None:
    counter = rival.lm if isinstance(rival.lm, CountingHF) else rival.lm.counts
    before, start = counter.tokens, time.perf_counter()
    found = getattr(rival.lm, requests[0].request_type)(requests, disable_tqdm=True)
    rival.seconds.append(time.perf_counter() - start)
    rival.tokens = counter.tokens - before
    rival.answers = [float(one[0] if isinstance(one, tuple) else one) for one in found]
    rival.greedy = [bool(one[1]) for one in found if isinstance(one, tuple)]


def _fastest(hf: Any, requests: list[Any], batch_sizes: list[int]) -> int:
    """The batch size at which hf is fastest, on the first requests."""
    if len(batch_sizes) == 1:
        return batch_sizes[0]
    some = requests[: max(int(len(requests) * _TRIED), min(len(requests), 2 * max(batch_sizes)))]
    times = {}
    for size in batch_sizes:
        hf.batch_size_per_gpu = size
        rival = _Rival(hf)
        _run(rival, some)
        times[size] = rival.seconds[0]
    return min(times, key=lambda size: times[size])


def _line(task: str, dtype: str, size: int, name: str, rival: _Rival, hf: _Rival) -> str:
    found, expected = (torch.tensor(one.answers, dtype=torch.float64) for one in (rival, hf))
    worst = float((found - expected).abs().max())
    if dtype == "float32":
        agrees = worst < _AGREE and rival.greedy == hf.greedy
    else:
        apart = float((found - expected).square().mean().sqrt())
        agrees = apart <= max(_STEP_16_BITS, _AGREE_16_BITS * float(expected.square().mean().sqrt()))
    ratio = f"{median(hf.seconds) / median(rival.seconds):.2f}" if agrees else "answers differ"
    return (
        f"| {task} | {dtype} | {len(found)} | {name} | {size} | {median(rival.seconds):.2f} | {rival.tokens} | "
        f"{ratio} | {hf.tokens / rival.tokens:.2f} | {worst:.1e} |"
    )


def _requests(folder: str, task: str, limit: int | None) -> list[Any]:
    manager = TaskManager(include_path=str(shipped_folder("tasks")), metadata={"pretrained": folder})
    if task not in manager.all_tasks:
        raise ConfigError(f"task {task!r} is not known to lm_eval or among ours; see lm_eval ls tasks")
    requests = []
    for one in manager.load([task])["tasks"].values():
        one.build_all_requests(limit=limit, rank=0, world_size=1)
        requests += one.instances
    kinds = {request.request_type for request in requests}
    if kinds - {"loglikelihood"} and kinds - {"loglikelihood_rolling"}:
        raise ConfigError(
            f"task {task!r} asks for {', '.join(sorted(kinds))}; bench scoring takes one of the log-likelihoods"
        )
    return requests
