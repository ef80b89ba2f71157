"""What a block-wise quantizer is given and gives: one decoder layer, its inputs, and how it is run.

Knows tensors and modules; no model class, no file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from intactkv_eval.weights.quantized import QuantizedWeight


@dataclass(frozen=True, eq=False)
class Block:
    """One decoder layer, in full precision until its method has changed it in place.

    name: its full name. layers: its linear layers (nn.Linear, or transformers' Conv1D) by their names inside of it.
    inputs: hidden states [1, T, C] of each sample, made by the layers quantized so far. run(hidden, i): the output for
    sample i of `module` as it is now, with the right positions and masks, behind the pivot's KV where calibration is
    pivot-aware. full_inputs: the inputs that the full-precision model makes, where they are kept.
    """

    name: str
    module: nn.Module
    layers: Mapping[str, nn.Module]
    inputs: Sequence[Tensor]
    run: Callable[[Tensor, int], Tensor]
    full_inputs: Sequence[Tensor] | None = None


class Method(Protocol):
    """A quantizer of blocks. wants_full_inputs: whether it uses `Block.full_inputs`, which double the memory."""

    wants_full_inputs: ClassVar[bool]

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """The quantized weight of every one of `block.layers`; the module computes with them (dequantized) afterwards.

        The same inputs give the same bytes.
        """
        ...
