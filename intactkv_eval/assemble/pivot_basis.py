"""A pivot from elsewhere in the basis of a checkpoint's values."""

from intactkv_eval.assemble.awq_basis import in_basis_of
from intactkv_eval.assemble.checks import REFERENCE_IN_MEMORY
from intactkv_eval.assemble.loaded_model import LoadedModel
from intactkv_eval.assemble.reference_check import Compared, rules_of, writer_of
from intactkv_eval.assemble.rotated_basis import in_rotated_basis
from intactkv_eval.assemble.source import ModelSource
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.weights.checkpoint import HeldTensors, TensorSource, files_of


def in_model_basis(
    pivot: PivotKV, loaded: LoadedModel, cell: CellSpec, source: ModelSource, compared: Compared
) -> tuple[PivotKV, float | None]:
    """`pivot` in the basis of the model's values; and how far a quantized checkpoint is from its reference."""
    checkpoint, reference = cell.model.pretrained, cell.model.reference
    if is_trained_here(pivot, cell):
        return pivot, compared.residual

    def tensors_of(name: str) -> TensorSource:
        held = HeldTensors(name, source.load(name, "main").state_dict()) if name == REFERENCE_IN_MEMORY else None
        return held or files_of(name)

    rotation = source.checkpoint.rotation
    if rotation is not None:
        rules = rules_of(loaded.quantization)
        return in_rotated_basis(pivot, loaded.model, rotation, checkpoint, reference, rules, tensors_of)
    if loaded.quantization is None:
        return pivot, compared.residual
    method = writer_of(loaded.quantization)
    pivot, residual = in_basis_of(pivot, loaded.model, method, checkpoint, reference, compared.unscaled, tensors_of)
    return pivot, compared.residual if residual is None else residual


def is_trained_here(pivot: PivotKV, cell: CellSpec) -> bool:
    """Calibrated rows are in the basis of the one model they were trained for, which check_calibrated asks for."""
    return pivot.fingerprint.calibrated is not None and not cell.pivot.transfer
