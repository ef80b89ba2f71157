"""The gradient of rounding: that of the number itself (Bengio et al. 2013), as rounding has none of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` exactly, with the gradient of `value`, of one shape."""
    apply: Callable[[Tensor, Tensor], Tensor] = _StraightThrough.apply
    return apply(value, rounded) if value.requires_grad else rounded


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None
