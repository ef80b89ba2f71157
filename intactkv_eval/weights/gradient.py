"""Gradients that torch does not give, or not in every release.

Rounding has none of its own: it gets that of the number itself (Bengio et al. 2013). `clamp` at a bound has 1 in torch
before 2.15 and 0 or 1/2 since; the released code of the methods ran with 1.
"""

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


def clamp_with_ends(value: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """`value.clamp(low, high)`, where a value at a bound counts as inside and keeps its gradient, in every torch."""
    clamped = value.detach().clamp(low, high)
    return torch.where(clamped == value, value, clamped) if value.requires_grad else clamped
