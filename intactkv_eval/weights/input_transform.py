"""What happens to the input of a linear layer before its product, as values: what a checkpoint says and a model does.

    x -> Hadamard transform across blocks (QuaRot's online ones) -> fake quantization of activations -> product

Knows no model and computes nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from intactkv_eval.cell.spec import ActivationSpec

Range = tuple[float, float]
"""The lowest and the highest number of a layer's input, as calibration saw it."""


class InputTransform(NamedTuple):
    """Of one layer. across: the width of the blocks that the transform goes across (1: the whole row), None for none.

    range: of a static (`tensor`) quantizer, None for all others.
    """

    across: int | None = None
    activations: ActivationSpec = ActivationSpec()
    range: Range | None = None

    @property
    def is_idle(self) -> bool:
        """Whether the input goes on as it came."""
        return self.across is None and self.activations.bits == 16


@dataclass(frozen=True)
class Rotation:
    """How a model was rotated (QuaRot): its residual stream by signs of `seed` and a Hadamard matrix, V by `head_dim`.

    online: layer -> the width of the blocks that its input is transformed across. digests: of the matrices H_K that the
    online transforms use, by the order of the transform.
    """

    seed: int
    head_dim: int
    online: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
