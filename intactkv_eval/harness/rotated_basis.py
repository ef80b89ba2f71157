"""Whether a rotated checkpoint is made from the model of a PivotKV, and the PivotKV in its basis.

The rotation is known from the checkpoint's config, so nothing is estimated: the reference's v_proj, rotated alike, must
be the checkpoint's up to rounding; and so must the embeddings, turned back.
"""

import torch
from transformers import PreTrainedModel

from intactkv_eval.errors import PivotError
from intactkv_eval.harness.awq_basis import dequantized, read_layer
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.basis import check_residuals, recover, to_rotated
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.rotation import FAMILIES, rotated_value, unrotated_rows
from intactkv_eval.weights.checkpoint import Checkpoint, checkpoint_folder
from intactkv_eval.weights.stages import Rotation


def in_rotated_basis(
    pivot: PivotKV, model: PreTrainedModel, rotation: Rotation, checkpoint: str, reference: str | None
) -> tuple[PivotKV, float | None]:
    """`pivot`, plain, in the basis of the rotated `model`; and, where there is a reference, the worst residual.

    Raises PivotError where the residual says that the checkpoint is of another model, or V is scaled beside.
    """
    if pivot.values[0].shape[-1] != rotation.head_dim:
        raise PivotError(
            f"{checkpoint} is rotated by heads of {rotation.head_dim}, the PivotKV has {pivot.values[0].shape[-1]}"
        )
    if reference is None:
        return to_rotated(pivot), None
    names = FAMILIES[model.config.get_text_config(decoder=True).model_type]
    source = Checkpoint(checkpoint_folder(reference, "main"))
    prefix, layers = decoder_layers(model)
    found = []
    for index, layer in enumerate(layers):
        wanted = [f"{name}.weight" for name in (names.value, names.attention_norm)]
        full, norm = read_layer(source, prefix, index, wanted)
        rows = slice(len(full) - pivot.values[index].shape[0] * rotation.head_dim, None)
        expected = rotated_value(full[rows], norm, rotation.seed, rotation.head_dim)
        ones = torch.ones(full.shape[1])
        found.append(recover(dequantized(layer.get_submodule(names.value))[rows], expected, ones, ones, folded=False))
    worst = check_residuals(found, checkpoint, reference)
    return to_rotated(pivot), worst


def check_rotated_embeddings(pivot: PivotKV, model: PreTrainedModel, rotation: Rotation) -> None:
    """Raise PivotError unless the model's embeddings, turned back, are those of the PivotKV's model."""
    weight = model.get_input_embeddings().weight.detach()
    width = weight.shape[1]
    places = torch.arange(0, weight.numel(), max(1, weight.numel() // 256))[:256]
    rows = unrotated_rows(weight[(places // width).to(weight.device)].cpu(), rotation.seed)
    numbers = rows[torch.arange(len(places)), places % width]
    pivot.check_embeddings("", tuple(numbers.tolist()), tuple(rows.square().mean(dim=1).sqrt().tolist()))
