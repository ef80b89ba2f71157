"""The matrix of a linear layer, whichever way round it is stored."""

from typing import Any

import torch
from torch import Tensor, nn

from intactkv_eval.compat.transformers_api import Conv1D
from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.quantized import QuantizedWeight


def matrix_of(layer: nn.Module) -> Tensor:
    """The layer's matrix as [O, I]: GPT-2's Conv1D stores its transpose."""
    held: Any = layer.weight
    weight: Tensor = held.detach()
    return weight.t().contiguous() if isinstance(layer, Conv1D) else weight


def finite_matrix(layer: nn.Module, name: str) -> Tensor:
    """The layer's matrix [O, I]. Raises CheckpointError where it holds NaN or inf; `name` is the layer's in it."""
    matrix = matrix_of(layer)
    if not torch.isfinite(matrix).all():
        raise CheckpointError(f"{name}.weight holds NaN or infinite values: the checkpoint is damaged or overflowed")
    return matrix


@torch.no_grad()
def set_matrix(layer: nn.Module, weight: QuantizedWeight) -> None:
    """Make the layer compute with the quantized weight, dequantized."""
    held: Any = layer.weight
    matrix = weight.dequantize(held.dtype).to(held.device)
    held.copy_(matrix.t() if isinstance(layer, Conv1D) else matrix)
