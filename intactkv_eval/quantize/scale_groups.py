"""Where a scale per channel may be folded into a decoder layer without changing its function, by architecture.

    front's output / s,  columns of the layers behind * s

A front is a norm, or a linear layer whose last output channels reach the layers behind through nothing but products
with something else, sums over tokens, or a ReLU. So: the norm before q, k, v; v before o where the two have equal
shapes (grouped kv heads share channels); the norm before the MLP; up before down; OPT's fc1 before fc2. Every fold here
is exact. Which a family has stands in model/families.py.
Source: Lin et al. 2023 (AWQ), section 3.2 and llm-awq's auto_scale.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.families import FAMILIES, ScaleGroup, family_of_layer, norm_offset
from intactkv_eval.quantize.method import Block


def scale_groups(block: Block) -> tuple[ScaleGroup, ...]:
    """The places of `block`. Raises UnsupportedModelError, with what is missing, where they are not known or not there.

    By the class of the layer, not by names: layers of the same names may be put together in another way.
    """
    family = family_of_layer(block.module)
    if family is None:
        known = ", ".join(one.layer_class for one in FAMILIES.values() if one.layer_class)
        raise UnsupportedModelError(
            f"{block.name}: no places for scales are known in a {type(block.module).__name__}. Known are {known}: use "
            "a method that folds nothing (rtn, gptq)"
        )
    groups = tuple(group for group in family.scale_groups if _folds(block, group))
    for group in groups:
        widths = {_linear(block, name).in_features for name in group.layers}
        if len(widths) != 1:
            raise UnsupportedModelError(
                f"{block.name}: {', '.join(group.layers)} do not have one input width: {widths}"
            )
        check_front(_module(block, group.front), f"{block.name}.{group.front}", widths.pop())
    return groups


@torch.no_grad()
def fold(block: Block, scales: Sequence[tuple[ScaleGroup, Tensor]]) -> dict[str, Tensor]:
    """Fold s [I] of each group: norms and biases in place, and the scaled matrices [O, I] of all of `block.layers`.

    The matrices are new, in fp32 (fp64 where the layer is), not rounded to the model's dtype; the layers keep theirs.
    What a norm's dtype rounds away is made up for in the columns.
    """
    matrices = {name: _wide(_linear(block, name).weight).clone() for name in block.layers}
    for group, scale in scales:
        front = _module(block, group.front)
        applied = divide_outputs(front, f"{block.name}.{group.front}", scale, matrices.get(group.front))
        for name in group.layers:
            matrices[name] *= applied
        if group.place == "values" and block.divide_values is not None:
            block.divide_values(scale)
    return matrices


def divide_outputs(front: nn.Module, name: str, factor: Tensor, matrix: Tensor | None = None) -> Tensor:
    """Divide the last outputs of `front`, a norm or a linear layer, by `factor`, in place (call it without gradient).

    Where `matrix` is given it is divided instead of the linear layer's own. Returns the factor [I] as the front's dtype
    has rounded it. Raises UnsupportedModelError where the front does not fit.
    """
    check_front(front, name, factor.numel())
    weight: Any = front.weight
    bias: Any = getattr(front, "bias", None)
    factor = factor.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
    if isinstance(front, nn.Linear):
        rows = slice(-factor.numel(), None)  # V is the last part of a fused qkv, up of a fused gate_up
        target = weight if matrix is None else matrix
        target[rows] = (_wide(target[rows]) / factor[:, None]).to(target.dtype)
        if bias is not None:
            bias[rows] = (_wide(bias[rows]) / factor).to(bias.dtype)
        return factor
    offset = norm_offset(front)
    before = _wide(weight) + offset
    weight.copy_(before / factor - offset)
    after = _wide(weight) + offset
    applied = torch.where(after == 0, factor, before / after)
    if bias is not None:
        bias.copy_(_wide(bias) / applied)
    return applied


def check_front(front: nn.Module, name: str, width: int) -> None:
    """Raise UnsupportedModelError unless `front` is a norm or a linear layer with `width` channels to divide."""
    weight: Any = getattr(front, "weight", None)
    if isinstance(front, nn.Linear) and front.out_features >= width:
        return
    if isinstance(front, nn.Linear) or weight is None or weight.ndim != 1 or weight.numel() != width:
        raise UnsupportedModelError(
            f"{name} ({type(front).__name__}) is neither a norm nor a linear layer with {width} channels"
        )


def _folds(block: Block, group: ScaleGroup) -> bool:
    """Whether a scale at this place leaves the function of this very layer as it is."""
    layer: Any = block.module
    if group.place == "values":  # grouped kv heads share channels
        return _linear(block, group.front).weight.shape == _linear(block, group.layers[0]).weight.shape
    if group.through_activation:  # nothing but a ReLU lets a scale through
        return isinstance(layer.activation_fn, nn.ReLU)
    # else a norm's output is the residual too
    return isinstance(_module(block, group.front), nn.Linear) or bool(getattr(layer, "do_layer_norm_before", True))


def _linear(block: Block, name: str) -> nn.Linear:
    layer = _module(block, name)
    if not isinstance(layer, nn.Linear) or name not in block.layers:
        raise UnsupportedModelError(f"{block.name}: {name} ({type(layer).__name__}) is none of its linear layers")
    return layer


def _module(block: Block, name: str) -> nn.Module:
    try:
        return block.module.get_submodule(name)
    except AttributeError:
        raise UnsupportedModelError(f"{block.name} ({type(block.module).__name__}) has no {name}") from None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
