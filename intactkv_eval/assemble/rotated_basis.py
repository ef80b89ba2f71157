"""Whether a rotated checkpoint is made from the model of a PivotKV, and the PivotKV in its basis.

The rotation is known from the checkpoint's config, so nothing is estimated: the reference's matrices, rotated alike,
must be the checkpoint's up to rounding (v_proj whole, some rows of others), and so must the embeddings, turned back.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.assemble.awq_basis import dequantized, read_layer
from intactkv_eval.errors import PivotError
from intactkv_eval.model.families import FAMILIES, RotatedLayer
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.model.tensor_names import NamedCheckpoint
from intactkv_eval.pivot.basis import LayerBasis, check_residuals, recover, to_rotated
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.same_weights import Rules, check_same
from intactkv_eval.pivot.weight_sample import Sampled
from intactkv_eval.quantize.rotation import (
    per_head,
    rotated_reader,
    rotated_value,
    rotated_writer,
    unrotated_rows,
)
from intactkv_eval.weights.checkpoint import TensorSource, files_of
from intactkv_eval.weights.hadamard import hadamard_rows
from intactkv_eval.weights.input_transform import Rotation

_ROWS = 16


def in_rotated_basis(
    pivot: PivotKV,
    model: PreTrainedModel,
    rotation: Rotation,
    checkpoint: str,
    reference: str | None,
    rules: Rules,
    tensors_of: Callable[[str], TensorSource] = files_of,
) -> tuple[PivotKV, float | None]:
    """`pivot`, plain, in the basis of the rotated `model`; and, where there is a reference, v_proj's worst residual.

    tensors_of: of `reference`, by its name.

    Raises PivotError where the weights say that the checkpoint is of another model, or V is scaled beside.
    """
    if pivot.values[0].shape[-1] != rotation.head_dim:
        raise PivotError(
            f"{checkpoint} is rotated by heads of {rotation.head_dim}, the PivotKV has {pivot.values[0].shape[-1]}"
        )
    if reference is None:
        return to_rotated(pivot), None
    names = FAMILIES[model.config.get_text_config(decoder=True).model_type].rotation
    assert names is not None  # the checkpoint says that it was rotated
    source = NamedCheckpoint(tensors_of(reference), model)
    prefix, layers = decoder_layers(model)
    values: list[LayerBasis] = []
    sampled: dict[str, Sampled] = {}
    expected: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        full, norm = read_layer(
            source, prefix, index, [f"{name}.weight" for name in (names.value, names.attention_norm)]
        )
        rows = slice(len(full) - pivot.values[index].shape[0] * rotation.head_dim, None)
        turned = rotated_value(full[rows], norm, rotation.seed, rotation.head_dim)
        ones = torch.ones(full.shape[1])
        values.append(recover(dequantized(layer.get_submodule(names.value))[rows], turned, ones, ones, folded=False))
        for part in _parts(names, source, f"{prefix}.{index}", rotation, len(turned)):
            expected[part.name] = part.expected
            sampled[part.name] = Sampled(dequantized(model.get_submodule(part.name))[part.rows], plain=False)
    worst = check_residuals(values, checkpoint, reference)
    check_same(sampled, expected, rules._replace(scaled=False), checkpoint, f"reference={reference}")
    return to_rotated(pivot), worst


class _Part(NamedTuple):
    """Some rows of one matrix of the reference as the rotation makes them; by the name in the model."""

    name: str
    rows: Tensor
    expected: Tensor


def _parts(
    names: RotatedLayer, source: NamedCheckpoint, layer: str, rotation: Rotation, values: int
) -> Iterator[_Part]:
    """values: how many of the last rows of the matrix that makes V are V's."""
    prefix, _, index = layer.rpartition(".")

    def read(*wanted: str) -> list[Tensor]:
        return read_layer(source, prefix, int(index), [f"{name}.weight" for name in wanted])

    for norm, readers in ((names.attention_norm, names.attention), (names.mlp_norm, names.mlp)):
        for name in readers:
            full, factors = read(name, norm)
            rows = _evenly(len(full) - (values if name == names.value else 0))
            if len(rows):
                yield _Part(f"{layer}.{name}", rows, rotated_reader(full[rows], factors, rotation.seed))
    for name in (names.output, names.down):
        (full,) = read(name)
        rows = _evenly(len(full))
        part = rotated_writer(full, rows, rotation.seed)
        part = per_head(part, rotation.head_dim) if name == names.output else part
        across = rotation.online.get(f"{layer}.{name}")
        yield _Part(f"{layer}.{name}", rows, part if across is None else hadamard_rows(part, across))


def _evenly(size: int) -> Tensor:
    return torch.arange(min(size, _ROWS)) * size // max(1, min(size, _ROWS))


def check_rotated_embeddings(pivot: PivotKV, model: PreTrainedModel, rotation: Rotation) -> None:
    """Raise PivotError unless the model's embeddings, turned back, are those of the PivotKV's model."""
    weight = model.get_input_embeddings().weight.detach()
    width = weight.shape[1]
    places = torch.arange(0, weight.numel(), max(1, weight.numel() // 256))[:256]
    rows = unrotated_rows(weight[(places // width).to(weight.device)].cpu(), rotation.seed)
    numbers = rows[torch.arange(len(places)), places % width]
    pivot.check_embeddings("", tuple(numbers.tolist()), tuple(rows.square().mean(dim=1).sqrt().tolist()))
