"""Decoding, batch 1, bf16 on the CPU: quantized models on packed weights against lm_eval's own `hf` in full precision.

The gate: the packed model's logits on a prompt agree with those of the same weights on the dense backend.
"""

import importlib.util
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.compat.lm_eval_api import HFLM, make_request
from intactkv_eval.demo import prepare_model
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.storage.files import cache_folder

PROMPT = "The lighthouse keeper wrote in his log every evening, and this is what he wrote on the last day of the year:"
NEW_TOKENS = 64
_AGREE = 5e-2  # relative RMS of logits: bf16 through all layers


def decode(model: str | None, repeats: int) -> str:
    """A markdown table: tokens a second of hf and of w4 and w3 (RTN, groups of 64), or of a packed checkpoint.

    A packed checkpoint's rival is GPTQModel's own kernel, where that library is installed.
    """
    folder = model or str(prepare_model(cache_folder() / "demo"))
    common: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu", "batch_size": 1}
    models: dict[str, Any] = {}
    if _is_packed(folder):
        cells: dict[str, dict[str, Any]] = {"intactkv": {}}
        if importlib.util.find_spec("gptqmodel") is not None:
            cells = {"GPTQModel's kernel (backend=gptqmodel)": {"backend": "gptqmodel"}, **cells}
    else:
        models["hf, full precision"] = HFLM(pretrained=folder, add_bos_token=True, **common)
        rtn = {"weights": "rtn", "group_size": 64}
        cells = {f"intactkv, w{bits}g64": {**rtn, "bits": bits} for bits in (4, 3)}
    worst: dict[str, float] = {}
    for name, cell in cells.items():
        models[name] = IntactKVLM(pretrained=folder, pivot="none", **cell, **common)
        dense = IntactKVLM(pretrained=folder, pivot="none", **{**cell, "backend": "dense"}, **common)
        worst[name] = _difference(models[name], dense)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(-1, repeats):  # the first, untimed, is where kernels are built and caches filled
        for name, lm in models.items():
            seconds = _seconds(lm)
            if turn >= 0:
                times[name].append(seconds)
    return _table(folder, times, worst, models)


def _is_packed(folder: str) -> bool:
    return read_quantization(folder, AutoConfig.from_pretrained(folder)).layout is not None


def _difference(one: IntactKVLM, other: IntactKVLM) -> float:
    ids = torch.tensor([one.tok_encode(PROMPT)])
    with torch.inference_mode():
        found, expected = (lm.model(ids).logits.double() for lm in (one, other))
    return float((found - expected).norm() / expected.norm())


def _seconds(lm: Any) -> float:
    options = {"until": [], "max_gen_toks": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    request = make_request("generate_until", (PROMPT, options))
    start = time.perf_counter()
    lm.generate_until([request], disable_tqdm=True)
    return time.perf_counter() - start


def _table(folder: str, times: dict[str, list[float]], worst: dict[str, float], models: dict[str, Any]) -> str:
    rival = next(iter(times))
    lines = [
        f"Decoding {NEW_TOKENS} tokens, batch 1, bf16, CPU, {torch.get_num_threads()} threads, {Path(folder).name}, "
        f"medians of {len(times[rival])} runs, prompt included",
        "",
        f"| model | backends | tokens/s | times {rival.split(',')[0]}'s speed | logits against dense |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, seconds in times.items():
        ours = name in worst
        agrees = not ours or worst[name] < _AGREE
        ratio = f"{median(times[rival]) / median(seconds):.2f}" if agrees else "answers differ"
        backends = ", ".join(models[name].cell_record()["backends"]) if ours else ""
        shown = f"{worst[name]:.1e}" if ours else ""
        lines.append(f"| {name} | {backends} | {NEW_TOKENS / median(seconds):.1f} | {ratio} | {shown} |")
    return "\n".join(lines)
