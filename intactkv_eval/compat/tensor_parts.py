"""The seam to libraries that keep weights in tensor subclasses of their own (torchao and its like).

Such a tensor has the shape and the dtype of the matrix that it stands for, and holds it in others: codes and scales.
Few operations work on it: no view, no slice, no hash. `__tensor_flatten__` is torch's protocol to name its parts.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import UnsupportedModelError

_SAMPLE = 1024  # elements of each tensor that go into the hash: cheap for 70B, and any training changes most of them


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
    if type(tensor).dequantize is Tensor.dequantize:
        raise UnsupportedModelError(
            f"{type(tensor).__name__} has no dequantize(): the numbers of a tensor of this type cannot be read"
        )
    whole: Tensor = tensor.detach().dequantize()
    return whole


def weight_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, shape, dtype and 1024 evenly spaced elements of every tensor; wherever the files lie.

    Of a tensor that wraps others (torchao's), the parts count.
    """
    digest = hashlib.sha256()
    parts = [part for name, tensor in tensors for part in tensor_parts(name, tensor)]
    for name, tensor in sorted(parts, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLE)
        digest.update(flat[::step][:_SAMPLE].to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]
