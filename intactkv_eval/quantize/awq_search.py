"""llm-awq's search results (.pt): scales that are folded into a full-precision model, and clips of its weights.

    {"scale": [(name before, [names of the linear layers], s [I]), ...], "clip": [(name, largest [O, G, 1]), ...]}

Scaling leaves the model's function as it was: what is before is divided by s, the columns of the layers multiplied.
The pivot's KV is captured after it, so it is in the right basis. Clipping is part of quantizing. Names are the modules'
full ones.
Source: llm-awq, quantize/auto_scale.py (apply_scale) and auto_clip.py (apply_clip).
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intactkv_eval.errors import CheckpointError, UnsupportedModelError
from intactkv_eval.quantize.fold_trial import Fold, changed_by
from intactkv_eval.quantize.scale_groups import check_front, divide_outputs
from intactkv_eval.storage.torch_pickle import read_torch_file

_ROUNDED = 2**-4  # of a norm's outputs in 16 bits


class AWQSearch(NamedTuple):
    """scales: what is before, the layers behind, s [I]. clips: magnitudes [O, G] by layer. digest: of the file."""

    scales: tuple[tuple[str, tuple[str, ...], Tensor], ...]
    clips: Mapping[str, Tensor]
    digest: str


def load_search(path: Path) -> AWQSearch:
    """Read a search result; of the pickle only tensors and plain containers. Raises CheckpointError."""
    try:
        found = read_torch_file(path)
        content = path.read_bytes()
    except (CheckpointError, OSError) as error:
        raise CheckpointError(f"awq_search={path}: cannot be read as llm-awq's search result ({error})") from None
    try:
        scales = tuple((str(before), _names(names), _scale(scale)) for before, names, scale in found["scale"])
        clips = {str(name): _clip(largest) for name, largest in found["clip"]}
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"awq_search={path}: expected the lists `scale` and `clip` of llm-awq ({error})"
        ) from None
    return AWQSearch(scales, clips, hashlib.sha256(content).hexdigest()[:16])


@torch.no_grad()
def apply_scales(model: nn.Module, search: AWQSearch) -> None:
    """Fold the scales into `model`, in place. Raises CheckpointError where a name or a width is not this model's.

    So too where the layers of a scale are not all that read what is before them: the model would become another one.
    """
    for before, names, scale in search.scales:
        _check_scale(model, before, names, scale)
    changed = changed_by(model, [Fold(before, names, scale.numel()) for before, names, scale in search.scales])
    if changed is not None:
        raise CheckpointError(
            f"awq_search: its scales are not folded into {type(model).__name__} without changing it: {changed} gets "
            "other inputs. Each scale must name all the layers that read what it divides, and nothing but products may "
            "lie between; search again for this model with llm-awq"
        )
    for before, names, scale in search.scales:
        layers: list[Any] = [_module(model, name) for name in names]
        factor = scale.to(layers[0].weight.device, torch.float32)
        divide_outputs(_module(model, before), before, factor)
        for layer in layers:
            layer.weight.copy_(layer.weight.float() * factor.to(layer.weight.device))


def check_clips(search: AWQSearch, layers: Iterable[str]) -> None:
    """Raise CheckpointError for a clip of none of `layers`, those that are quantized: it would do nothing."""
    idle = sorted(search.clips.keys() - set(layers))
    if idle:
        raise CheckpointError(f"awq_search: {idle[0]}, which it clips, is no linear layer that is quantized here")


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


def _check_scale(model: nn.Module, before: str, names: tuple[str, ...], scale: Tensor) -> None:
    front, width = _module(model, before), scale.numel()
    for name in names:
        layer = _module(model, name)
        if not isinstance(layer, nn.Linear) or layer.in_features != width:
            raise CheckpointError(f"awq_search: {name} should be a linear layer of {width} inputs")
    try:
        check_front(front, before, width)
    except UnsupportedModelError as error:
        raise CheckpointError(f"awq_search: {error}") from None
    if not isinstance(front, nn.Linear) and not _divides(front, before, scale):
        raise CheckpointError(
            f"awq_search: {before} ({type(front).__name__}) does not multiply by its weights alone: no scale can "
            "be folded into it"
        )


def _divides(norm: nn.Module, name: str, scale: Tensor) -> bool:
    """Whether its outputs are divided where its weights are, but for what rounding does to most of them."""
    weight: Any = norm.weight
    rows = torch.randn(4, scale.numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    made = copy.deepcopy(norm)
    divide_outputs(made, name, scale)
    plain, found = norm(rows), made(rows) * scale.to(weight.device)
    return bool((found - plain).abs().median() <= _ROUNDED * plain.abs().median())


def _names(names: Iterable[object]) -> tuple[str, ...]:
    found = tuple(map(str, names))
    if not found:
        raise ValueError("a scale without layers")
    return found


def _scale(scale: Tensor) -> Tensor:
    found = _finite(scale)
    if found.ndim != 1 or not (found > 0).all():
        raise ValueError(f"a scale {tuple(found.shape)}; it should be [I], each number above 0")
    return found


def _clip(largest: Tensor) -> Tensor:
    found = _finite(largest)
    if found.ndim != 3 or found.shape[2] != 1 or not found.numel() or not (found >= 0).all():
        raise ValueError(f"a clip {tuple(found.shape)}; it should be [O, G, 1], no number below 0")
    return found.squeeze(2)


def _finite(tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        raise ValueError(f"a scale or clip is {tensor.layout} of {tensor.dtype}; it should be a plain real tensor")
    found = tensor.float()
    if not torch.isfinite(found).all():
        raise ValueError("a scale or clip is NaN or infinite")
    return found
