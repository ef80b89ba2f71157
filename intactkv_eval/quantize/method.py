"""A block-wise quantizer, and what it is given: one decoder layer, its inputs, and a way to run it.

Knows no model: masks, positions and the pivot's KV are inside of `run`, file formats elsewhere.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from intactkv_eval.errors import ConfigError
from intactkv_eval.model.matrices import set_matrix
from intactkv_eval.weights.quantized import QuantizedWeight, check_bits


@dataclass(frozen=True, eq=False)
class Block:
    """A decoder layer that is to be quantized.

    name: its full name, "model.layers.3". module: the layer itself, in full precision, to be changed in place.
    layers: its linear layers (nn.Linear, or transformers' Conv1D) by name relative to the block.
    inputs: the hidden states [1, T, C] of each sample, from the model as quantized so far, without gradient.
    run: run(hidden states of sample i, i) -> those that `module` makes of them as it is now, with the right positions
    and masks, and the pivot's KV in front where calibration is pivot-aware. Follows the dtype of what it is given;
    differentiable where grad is enabled (so `inputs` must not be inference tensors).
    full_inputs: the inputs from the full-precision model; None where the method does not want them.
    divide_values: called with t [H*D] where V's channels have been divided by t, so that the values of a pivot that
    `run` has in front follow; None where there is no pivot.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Module]
    inputs: Sequence[Tensor]
    run: Callable[[Tensor, int], Tensor]
    full_inputs: Sequence[Tensor] | None = None
    divide_values: Callable[[Tensor], None] | None = None


class Method(Protocol):
    """A quantizer of one block at a time. The same block gives the same bytes."""

    wants_full_inputs: ClassVar[bool]

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """The weight of every one of `block.layers`; `block.module` computes with them afterwards, in its own dtype,
        and has in place whatever was folded into norms and biases."""
        ...


def install(block: Block, weights: Mapping[str, QuantizedWeight]) -> None:
    """Put what `weights` stand for into the linear layers of `block`, in their own dtype."""
    for name, weight in weights.items():
        set_matrix(block.layers[name], weight)


def check_settings(bits: int, group_size: int) -> None:
    """Raise ConfigError for what no method can round to; whether a width can be shared by it, its layers tell."""
    check_bits(bits)
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"group_size={group_size}: use a width that is shared by a scale, or -1 for whole rows")
