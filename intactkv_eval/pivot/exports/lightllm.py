"""A PivotKV as LightLLM serves it: two keys of config.json, and one file for each tensor-parallel rank.

    prompt_cache_token_ids: [id, ...]    prompt_cache_kv_buffer: {"rank_0": file, ...}
    file: torch.save of {"kv_buffer": [L, P, 2*H/ranks, D]}, the rank's key heads before its value heads

Source: LightLLM, server/router/model_infer/mode_backend/base_backend.py (preload_prompt_cache_kv_buffer) and its memory
manager (load_index_kv_buffer).
"""

import json
from pathlib import Path
from typing import Any

import torch

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.basis import ROTATED
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.limits import read_bytes
from intactkv_eval.storage.tensor_file import write_pickle


def _check_fits(pivot: PivotKV, config: dict[str, Any], folder: Path) -> None:
    method = (config.get("quantization_config") or {}).get("quant_method")
    if pivot.fingerprint.basis == ROTATED or method == "intactkv":
        raise PivotError(
            f"{folder}: rotated values, and checkpoints of the format intactkv, are nothing LightLLM reads"
        )
    if method in {"awq", "compressed-tensors"} and pivot.fingerprint.basis == "plain":
        raise PivotError(
            f"{folder} is quantized by {method}, which may have V scaled: this pivot is in the full-precision model's "
            "basis, and would be quietly wrong in it"
        )
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    found = (len(pivot.keys), pivot.keys[0].shape[0])
    if found != (config.get("num_hidden_layers"), heads):
        raise PivotError(
            f"{folder}: a model of {config.get('num_hidden_layers')} layers and {heads} kv heads; this pivot has "
            f"{found[0]} and {found[1]}"
        )


def write_lightllm(pivot: PivotKV, folder: Path, ranks: int = 1) -> None:
    """Put `pivot` into the checkpoint `folder`, for `ranks` tensor-parallel ranks.

    Raises PivotError where there is no config.json, or the heads cannot be shared out or are not alike in all layers.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise PivotError(f"{folder}: no config.json; name the folder of the checkpoint that LightLLM will serve")
    try:
        config = parse_json(read_bytes(file))
        _check_fits(pivot, config, folder)
    except (ValueError, AttributeError, TypeError) as error:
        raise PivotError(f"{file}: cannot be read as a model's config ({error})") from None
    shapes = {tuple(tensor.shape) for tensor in (*pivot.keys, *pivot.values)}
    if len(shapes) != 1:
        raise PivotError(f"LightLLM holds keys and values of one shape; this PivotKV has {sorted(shapes)}")
    heads = pivot.keys[0].shape[0]
    if ranks < 1 or heads % ranks:
        raise PivotError(f"{heads} kv heads cannot be shared out evenly among {ranks} ranks")
    keys, values = (torch.stack(part).transpose(1, 2) for part in (pivot.keys, pivot.values))  # [L, P, H, D]
    names = {}
    for rank in range(ranks):
        own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
        buffer = torch.cat((keys[:, :, own], values[:, :, own]), dim=2).contiguous()
        names[f"rank_{rank}"] = name = f"prompt_cache_rank_{rank}.pt"
        write_pickle(folder / name, {"kv_buffer": buffer})
    config |= {"prompt_cache_token_ids": list(pivot.token_ids), "prompt_cache_kv_buffer": names}
    write_atomic(file, lambda partial: partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
