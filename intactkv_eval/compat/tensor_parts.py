"""The seam to libraries that keep weights in tensor subclasses of their own (torchao and its like).

Such a tensor has the shape and the dtype of the matrix that it stands for, and holds it in other tensors: codes, scales.
Few operations work on it: no view, no slice, no hash. `__tensor_flatten__` is torch's protocol to name its parts.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import UnsupportedModelError


def is_wrapper(tensor: Any) -> bool:
    """Whether a tensor holds its numbers in other tensors, by torch's protocol for traceable subclasses."""
    return isinstance(tensor, Tensor) and hasattr(tensor, "__tensor_flatten__")


def tensor_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that hold the numbers of `tensor`, each with a name below `name`; a plain one as it is."""
    if not is_wrapper(tensor):
        yield name, tensor
        return
    parts, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    for part in parts:
        yield from tensor_parts(f"{name}.{part}", getattr(tensor, part))


@torch.no_grad()
def plain_numbers(tensor: Tensor) -> Tensor:
    """The numbers that a tensor stands for, as a plain one of its shape; a plain one as it is.

    Raises UnsupportedModelError for a wrapper that does not say how it is dequantized.
    """
    if not is_wrapper(tensor):
        return tensor.detach()
    if not hasattr(tensor, "dequantize"):
        raise UnsupportedModelError(
            f"{type(tensor).__name__} has no dequantize(): the numbers of a tensor of this type cannot be read"
        )
    whole: Tensor = tensor.detach().dequantize()
    return whole
