"""Packed checkpoints written by numpy alone, beside what they mean: four bits, groups of 32, symmetric."""

import json
import shutil

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    "actorder": None,
}  # fmt: skip


def ct_config(weights=None, group=None, **changes):
    """What llm-compressor writes into config.json."""
    one = {"targets": ["Linear"], "weights": {**WEIGHTS, **(weights or {})}, "input_activations": None, **(group or {})}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": one}, "ignore": ["lm_head"], "kv_cache_scheme": None, **changes,
    }  # fmt: skip


def _words(codes):
    """[R, C] -> [R, C / 8]: the first of eight codes in the lowest bits."""
    eights = codes.astype(np.uint32).reshape(len(codes), -1, 8)
    return torch.from_numpy((eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(2, dtype=np.uint32).view(np.int32))


def packed_layer(layout, weight, zero=8):
    """The tensors of one layer by their last names, and its dequantized matrix. zero: what GPTQ's version stores."""
    groups = weight.numpy().reshape(len(weight), -1, 32)
    scales = (np.abs(groups).max(2) / 7).astype(np.float16)
    scales[scales == 0] = 1
    codes = np.clip(np.rint(groups / scales[..., None].astype(np.float32)) + 8, 0, 15)
    meant = torch.from_numpy(((codes - 8) * scales[..., None].astype(np.float32)).reshape(weight.shape))
    codes = codes.reshape(weight.shape)
    if layout == "compressed-tensors":
        tensors = {
            "weight_packed": _words(codes),
            "weight_scale": torch.from_numpy(scales),
            "weight_shape": torch.tensor(weight.shape),
        }
        return tensors, meant
    tensors = {
        "qweight": _words(codes).t(),
        "qzeros": _words(np.full(scales.T.shape, zero)),
        "scales": torch.from_numpy(scales.T.copy()),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 32,
    }
    return {key: value.contiguous() for key, value in tensors.items()}, meant


def packed_tensors(base, layout, is_packed, rename=lambda name: name, zero=7):
    """Of the checkpoint `base`: its tensors with some layers packed, renamed; and all of them as plain numbers."""
    packed, plain = {}, {}
    for name, value in load_file(base / "model.safetensors").items():
        if is_packed(name):
            held, plain[name] = packed_layer(layout, value.float(), zero)
            packed |= {f"{rename(name).removesuffix('.weight')}.{key}": tensor for key, tensor in held.items()}
        else:
            packed[rename(name)] = plain[name] = value
    return packed, plain


def written(base, out, tensors, quantization=None, file="model.safetensors", **config):
    """A copy of `base` with other tensors, and more in its config.json."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({name: value.contiguous() for name, value in tensors.items()}, out / file, metadata={"format": "pt"})
    said = {**json.loads((out / "config.json").read_text()), **config}
    if quantization is not None:
        said["quantization_config"] = quantization
    (out / "config.json").write_text(json.dumps(said))
    return out
