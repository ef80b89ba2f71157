"""The backend `gptqmodel`: the layer in GPTQModel's own kernels (Marlin, Machete, ExLlama, its CPU ones), if installed.

GPTQModel chooses among its kernels by what the layer and the device are; nothing of that choice is repeated here.
Source: gptqmodel 7.7, utils/importer.py.
"""

import importlib.util
from typing import Any, cast

import torch
from torch import Tensor, nn

from intactkv_kernels.parts import Parts

_WORST = 2e-2  # relative, in 16 bits


class GPTQModelLinear(nn.Module):
    """A linear layer of GPTQModel's. The weight's own tensors are kept beside it: its kernels repack theirs."""

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        self._parts = parts
        self.kernel = _built(parts, dtype)
        self._check(dtype)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> y [..., O]."""
        y = cast(Tensor, self.kernel(x))
        return y if bias is None else y + bias

    @torch.inference_mode()
    def _check(self, dtype: torch.dtype) -> None:
        """Raise ValueError where the kernel does not compute this weight: one that drops zeros has been seen."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, self._parts.in_features, generator=generator).to(self._parts.words.device, dtype)
        expected = x.double() @ self.matrix(torch.float32).double().t()
        error = float((self.kernel(x).double() - expected).norm() / expected.norm())
        if not error < _WORST:
            raise ValueError(
                f"gptqmodel's {type(self.kernel).__name__} is off by {error:.2f} of the result; use backend=auto"
            )

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [O, I]."""
        return self._parts.dequantize(self._parts.tensors(), dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Packed codes, scales, zeros, and order where there is one."""
        return self._parts.tensors()


def why_not(parts: Parts, dtype: torch.dtype) -> str | None:
    """Why GPTQModel cannot run this layer, or None where it can."""
    if importlib.util.find_spec("gptqmodel") is None:
        return "gptqmodel is not installed (pip install gptqmodel)"
    try:
        _kind(parts, dtype)
    except (ValueError, NotImplementedError, ImportError) as error:
        return f"gptqmodel has no kernel for it ({error})"
    return None


def _kind(parts: Parts, dtype: torch.dtype) -> Any:
    from gptqmodel.utils.importer import select_quant_linear  # noqa: PLC0415  an optional library

    return select_quant_linear(
        bits=parts.bits,
        group_size=_group_size(parts),
        desc_act=parts.order is not None,
        sym=_symmetric(parts),
        device=parts.words.device,
        pack_dtype=torch.int32,
        dtype=dtype,
    )


def _built(parts: Parts, dtype: torch.dtype) -> nn.Module:
    from gptqmodel.utils.backend import BACKEND  # noqa: PLC0415

    kind = _kind(parts, dtype)
    layer: Any = kind(
        bits=parts.bits,
        group_size=_group_size(parts),
        desc_act=parts.order is not None,
        sym=_symmetric(parts),
        in_features=parts.in_features,
        out_features=parts.out_features,
        bias=False,
        pack_dtype=torch.int32,
        register_buffers=True,
        backend=BACKEND.AUTO,
        dtype=dtype,
    )
    wants_v1 = not getattr(kind, "REQUIRES_FORMAT_V2", False)
    for name, tensor in parts.gptq(wants_v1).items():
        setattr(layer, name, tensor.to(dtype) if name == "scales" else tensor)
    if hasattr(layer, "qzero_format"):
        layer.qzero_format(1 if wants_v1 else 2)
    if hasattr(layer, "scratch_space_fixed"):  # ExLlama v2 works in memory that the caller provides
        from gptqmodel.utils.exllamav2 import ScratchSpace  # noqa: PLC0415

        scratch = ScratchSpace(scratch_bytes=layer.scratch_space_fixed(), dev=parts.words.device)
        layer.post_init(scratch_space=scratch)
    else:
        layer.post_init()
    made: nn.Module = layer.eval()
    return made


def _group_size(parts: Parts) -> int:
    return -1 if parts.group_size == parts.in_features else parts.group_size


def _symmetric(parts: Parts) -> bool:
    return bool((parts.zeros == 2 ** (parts.bits - 1)).all())
