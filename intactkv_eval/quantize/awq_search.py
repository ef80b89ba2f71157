"""llm-awq's search results (.pt): scales that are folded into a full-precision model, and clips of its weights.

    {"scale": [(name before, [names of the linear layers], s [I]), ...], "clip": [(name, largest [O, G, 1]), ...]}

Scaling leaves the model's function as it was: what is before is divided by s, the columns of the layers multiplied.
The pivot's KV is captured after it, so it is in the right basis. Clipping is part of quantizing. Names are the modules'
full ones.
Source: llm-awq, quantize/auto_scale.py (apply_scale) and auto_clip.py (apply_clip).
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intactkv_eval.documents import BROKEN_PICKLE
from intactkv_eval.errors import CheckpointError, UnsupportedModelError
from intactkv_eval.quantize.scale_groups import divide_outputs


class AWQSearch(NamedTuple):
    """scales: what is before, the layers behind, s [I]. clips: magnitudes [O, G] by layer. digest: of the file."""

    scales: tuple[tuple[str, tuple[str, ...], Tensor], ...]
    clips: Mapping[str, Tensor]
    digest: str


def load_search(path: Path) -> AWQSearch:
    """Read a search result; of the pickle only tensors and plain containers (weights_only). Raises CheckpointError."""
    try:
        content = path.read_bytes()
        found = torch.load(path, weights_only=True, map_location="cpu")
    except BROKEN_PICKLE as error:
        raise CheckpointError(f"awq_search={path}: cannot be read as llm-awq's search result ({error})") from None
    try:
        scales = tuple((str(before), tuple(map(str, names)), _finite(scale)) for before, names, scale in found["scale"])
        clips = {str(name): _finite(largest).squeeze(-1) for name, largest in found["clip"]}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"awq_search={path}: expected the lists `scale` and `clip` of llm-awq ({error})"
        ) from None
    return AWQSearch(scales, clips, hashlib.sha256(content).hexdigest()[:16])


@torch.no_grad()
def apply_scales(model: nn.Module, search: AWQSearch) -> None:
    """Fold the scales into `model`, in place. Raises CheckpointError where a name or a width is not this model's.

    The clips' names are checked too: one that is no linear layer's would be passed over without a word.
    """
    for name in search.clips:
        if not isinstance(_module(model, name), nn.Linear):
            raise CheckpointError(f"awq_search: {name}, which it clips, is no linear layer of {type(model).__name__}")
    for before, names, scale in search.scales:
        front = _module(model, before)
        layers: list[Any] = [_module(model, name) for name in names]
        for name, layer in zip(names, layers, strict=True):
            if not isinstance(layer, nn.Linear) or layer.in_features != scale.numel():
                raise CheckpointError(f"awq_search: {name} should be a linear layer of {scale.numel()} inputs")
        factor = scale.to(layers[0].weight.device, torch.float32)
        try:
            divide_outputs(front, before, factor)
        except UnsupportedModelError as error:
            raise CheckpointError(f"awq_search: {error}") from None
        for layer in layers:
            layer.weight.copy_(layer.weight.float() * factor)


def clipped(matrix: Tensor, largest: Tensor | None) -> Tensor:
    """`matrix` [O, I] with each group's magnitude cut at `largest` [O, G]; as it is where there is none."""
    if largest is None:
        return matrix
    if matrix.shape[0] != largest.shape[0] or matrix.shape[1] % largest.shape[1]:
        raise CheckpointError(f"awq_search: clips {tuple(largest.shape)} do not fit a matrix {tuple(matrix.shape)}")
    bound = largest.to(matrix.device, matrix.dtype).repeat_interleave(matrix.shape[1] // largest.shape[1], dim=1)
    return torch.minimum(torch.maximum(matrix, -bound), bound)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"awq_search: {name} is no module of {type(model).__name__}") from None


def _finite(tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise ValueError("a scale or clip is NaN or infinite")
    return tensor.float()
