"""How a whole checkpoint is quantized, for the formats to write into its config."""

from typing import Any, NamedTuple

from intactkv_eval.cell.spec import ActivationSpec, SymmetricFormula
from intactkv_eval.weights.input_transform import Rotation


class CheckpointScheme(NamedTuple):
    """bits, group_size (-1 per channel), symmetric; made_by: program and method; kept: layers in full precision.

    act_order: whether groups are of inputs in an order of their own.
    activations, rotation: what only the format `intactkv` can say. symmetric_formula: whose formula made the symmetric
    scales, None where they are asymmetric or nobody knows.
    """

    bits: int
    group_size: int
    symmetric: bool
    made_by: str
    kept: tuple[str, ...] = ("lm_head",)
    activations: ActivationSpec = ActivationSpec()
    rotation: Rotation | None = None
    act_order: bool = False
    symmetric_formula: SymmetricFormula | None = None

    @property
    def has_stages(self) -> bool:
        """Whether inputs of layers are transformed or quantized."""
        return self.activations.bits < 16 or self.rotation is not None

    @property
    def meta(self) -> dict[str, Any]:
        """What formats with a place for notes say of how the weights were made."""
        formula = {"symmetric_formula": self.symmetric_formula} if self.symmetric_formula else {}
        return {"quantizer": [self.made_by], **formula}
