"""What a backend is given of a quantized weight. Knows no packing and no formula: they are handed in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Parts(NamedTuple):
    """A quantized weight [O, I], as its owner hands it over.

    words: [O, W] int32, packed codes. scales: [O, G]. zeros: [O, G] uint8. order: [I] int32 or None (act-order).
    unpack: words -> codes [O, I] (uint8), columns in `order`. dequantize: (what `tensors` gives, dtype) -> the matrix
    [O, I]. gptq: qweight, qzeros, scales, g_idx as a GPTQ checkpoint holds them, zeros less one if called with True.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None
    bits: int
    group_size: int
    in_features: int
    unpack: Callable[[Tensor], Tensor]
    dequantize: Callable[[dict[str, Tensor], torch.dtype], Tensor]
    gptq: Callable[[bool], dict[str, Tensor]]

    @property
    def out_features(self) -> int:
        """O."""
        return self.words.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the weight, by name; `order` only where there is one."""
        held = {"codes": self.words, "scales": self.scales, "zeros": self.zeros}
        return held if self.order is None else {**held, "order": self.order}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """What every layout of a packed weight [O, I] on the CPU holds beside its codes.

    scales: [O, G]. zeros: [O, G] uint8. order: [I] int64 or None (act-order).
    """

    scales: Tensor
    zeros: Tensor
    order: Tensor | None
    bits: int
    group_size: int
    in_features: int
    out_features: int


class FrozenProduct(torch.autograd.Function):
    """run(x) [..., O] of a frozen matrix, with the gradient of x through `matrix(dtype)` [O, I], made when needed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], matrix: Callable[[torch.dtype], Tensor]
    ) -> Tensor:
        """y = run(x)."""
        ctx.matrix = matrix
        return run(x)

    @staticmethod
    def backward(ctx: Any, *upper: Any) -> tuple[Any, ...]:
        """With respect to x alone."""
        return upper[0] @ ctx.matrix(upper[0].dtype), None, None
