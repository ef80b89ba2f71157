"""The layer and the torch operator around triton_linear.py: buffers, torch.compile, CUDA graphs, the gradient of x.

Triton is imported when the first layer runs: a machine without it can import this module.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_kernels.parts import FrozenProduct, Parts


class TritonLinear(nn.Module):
    """A linear layer on the packed codes as they are."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in parts.tensors().items():
            self.register_buffer(name, tensor)
        self.bits, self.group_size = parts.bits, parts.group_size
        self._dequantize = parts.dequantize

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> y [..., O]."""
        if x.requires_grad and torch.is_grad_enabled():
            y: Tensor = FrozenProduct.apply(x, lambda rows: self._run(rows, bias), self.matrix)  # type: ignore[no-untyped-call]
            return y
        return self._run(x, bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized matrix [O, I]."""
        return self._dequantize(self.tensors(), dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Packed codes, scales, zeros, and order where there is one."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def _run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        order = self._buffers.get("order")
        y: Tensor = _operator(x, self.codes, self.scales, self.zeros, order, bias, self.bits, self.group_size)
        return y


@torch.library.custom_op("intactkv::triton_linear", mutates_args=())
def _operator(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    order: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y: Tensor = _kernel()(rows, codes, scales, zeros, bits, group_size, order, bias)
    return y.view(*x.shape[:-1], codes.shape[0])


@_operator.register_fake
def _(x: Tensor, codes: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


@lru_cache(maxsize=1)
def _kernel() -> Any:
    return import_module("intactkv_kernels.triton_linear").triton_linear
