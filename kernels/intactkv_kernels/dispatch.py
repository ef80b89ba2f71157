"""Which backend runs a quantized linear layer.

    dense      the weight is dequantized once, when the model is loaded, then torch's own product. Any device and
               dtype; the memory of the full-precision model.
    cpu        packed weights on the CPU (cpu.py). Every dtype is right; faster than dense with bf16 activations.
    triton     packed weights on a CUDA device (triton_linear.py), fp16 and bf16
    gptqmodel  the layer is handed to GPTQModel's own kernels, where that library is installed

`auto`: triton on CUDA in 16 bits, cpu on the CPU in bf16, and dense where neither can run the layer.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from intactkv_kernels import cpu
from intactkv_kernels.cpu_layer import CpuLinear
from intactkv_kernels.dense import DenseLinear
from intactkv_kernels.gptqmodel_layer import GPTQModelLinear
from intactkv_kernels.gptqmodel_layer import why_not as gptqmodel_cannot
from intactkv_kernels.parts import Parts
from intactkv_kernels.triton_layer import TritonLinear


class BackendLayer(Protocol):
    """What every backend's layer can do, beside being an nn.Module."""

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [O, I]."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Codes (packed int32 words, or unpacked uint8), scales, zeros, and order where there is one."""
        ...


_LAYERS: dict[str, Callable[[Parts, torch.dtype], nn.Module]] = {
    "dense": DenseLinear,
    "cpu": CpuLinear,
    "triton": TritonLinear,
    "gptqmodel": GPTQModelLinear,
}
BACKENDS = tuple(_LAYERS)


def choose_backend(requested: str, parts: Parts, dtype: torch.dtype) -> str:
    """The backend that will run the layer for `requested` ("auto" or one of BACKENDS).

    Raises ValueError for any other name, and with the reason where a named backend cannot run this layer.
    """
    if requested == "auto":
        device = parts.words.device.type
        preferred = {"cpu": "cpu" if dtype is torch.bfloat16 else "dense", "cuda": "triton"}.get(device, "dense")
        return preferred if why_not(preferred, parts, dtype) is None else "dense"
    if requested not in _LAYERS:
        raise ValueError(f"backend={requested!r} is not one of auto, {', '.join(BACKENDS)}")
    reason = why_not(requested, parts, dtype)
    if reason is not None:
        raise ValueError(f"backend={requested} cannot run it: {reason}; use backend=auto")
    return requested


def why_not(backend: str, parts: Parts, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run this layer on the device where its weight is, or None where it can."""
    device = parts.words.device.type
    if backend == "cpu":
        if device != "cpu":
            return f"its weight is on {device}"
        return cpu.why_not(parts.bits, parts.group_size, parts.in_features)
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"its weight is on {device}, and Triton runs on CUDA devices"
        return None if dtype in {torch.float16, torch.bfloat16} else f"activations of {dtype}; load in 16 bits"
    return gptqmodel_cannot(parts, dtype) if backend == "gptqmodel" else None


def build_layer(backend: str, parts: Parts, dtype: torch.dtype) -> nn.Module:
    """The layer of a chosen backend for activations of `dtype`."""
    return _LAYERS[backend](parts, dtype)
