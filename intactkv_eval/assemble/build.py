"""From a loaded full-precision model to the model of a cell: pivot captured, then weights quantized.

Knows models and cells; no lm_eval.
"""

import copy
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.assemble.awq_basis import in_basis_of
from intactkv_eval.assemble.chat_date import head_record
from intactkv_eval.assemble.checkpoint_info import as_held
from intactkv_eval.assemble.checks import (
    IN_MEMORY,
    REFERENCE_IN_MEMORY,
    check_belongs,
    check_cache,
    check_calibrated,
    check_codebook,
    check_kept_rows,
    check_origin,
)
from intactkv_eval.assemble.model_cache import Shelf
from intactkv_eval.assemble.pivot_source import Loader, captured, pivot_of_file, pivot_of_reference, tokens_in_front
from intactkv_eval.assemble.reference_check import Compared, rules_of, writer_of
from intactkv_eval.assemble.rotated_basis import in_rotated_basis
from intactkv_eval.cell.spec import CellSpec, WeightSpec
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.compat.tensor_parts import weight_hash
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.inference.causality import check_causal
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.model.input_transforms import apply_stages, stage_specs
from intactkv_eval.model.linear import backends_of, quantized_layers
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.structure import check_resident, linear_layers
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.capture import check_supported
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.awq_search import AWQSearch, apply_scales, check_clips, clipped, load_search
from intactkv_eval.quantize.rotation import check_rotatable, rotate
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.checkpoint import HeldTensors, TensorSource, files_of
from intactkv_eval.weights.input_transform import Rotation, StageSpec
from intactkv_eval.weights.quantized import QuantizedWeight


class Built(NamedTuple):
    """The model of a cell, and what identifies the weights it was made from."""

    pivoted: PivotedModel
    source_hash: str
    quantization: dict[str, Any] | None
    backends: dict[str, int]
    basis_residual: float | None = None
    search_digest: str | None = None


def build(
    cell: CellSpec,
    config: PretrainedConfig,
    tokenizer: Any,
    load: Loader,
    quantization: dict[str, Any] | None = None,
    changed: Collection[str] = (),
    rotation: Rotation | None = None,
    shelf: Shelf | None = None,
    chat: ChatSettings | None = None,
) -> Built:
    """Load, capture, quantize. The full-precision model is freed before a `pretrained` beside it is loaded.

    `quantization` is what the checkpoint says of its own, None for one in full precision. `changed`: names
    whose models are not what their files alone say (an adapter, a GGUF file, an object): no pivot is kept under these.
    `rotation`: how the checkpoint's model was rotated. `shelf`: where `load` takes models from that others get too.
    `chat`: how the chat template is rendered.

    Raises ConfigError, PivotError, CheckpointError or UnsupportedModelError, each with the fix.
    """
    vocabulary = config.get_text_config(decoder=True).vocab_size
    from_file = pivot_of_file(cell)
    token_ids = (
        from_file.token_ids
        if from_file
        else tokens_in_front(cell, tokenizer, vocabulary, load, quantization, chat, changed)
    )
    check_kept_rows(cell, len(token_ids))
    codebook = Codebook.load(Path(cell.kv.codebook)) if cell.kv.codebook is not None else None
    pivot = from_file
    if cell.pivot.intact and pivot is None and cell.model.reference:
        pivot = pivot_of_reference(cell, cell.model.reference, token_ids, load, config, changed)
    check_origin(cell, quantization, needs_pivot=cell.pivot.intact and pivot is None)
    model = _loaded(cell, load)
    quantization = as_held(quantization, model)
    search = None if cell.weights.search is None else load_search(Path(cell.weights.search))
    residual = None
    if pivot is not None:
        pivot, compared = check_belongs(pivot, model, cell, quantization, rotation)
        pivot, residual = _in_basis(pivot, model, cell, quantization, rotation, compared, load)
    if codebook is not None:
        check_codebook(codebook, model, cell, quantization)
    source_hash = _source_hash(model)
    if search is not None:
        model = _scaled(model, cell, search, pivot, shelf)
    if cell.pivot.intact and pivot is None:
        pivot = captured(model, cell.model.pretrained, cell, token_ids, search, changed)
    if cell.weights.rotate and pivot is not None and not _is_trained_here(pivot, cell):
        pivot = to_rotated(pivot)
    model = _evaluated_once(model, cell, search, shelf)
    if pivot is not None and cell.pivot.source == "prompt":
        pivot = replace(pivot, head=head_record(tokenizer, chat or ChatSettings()))
    if from_file is not None and cell.pivot.intact:
        check_calibrated(from_file, model, cell, tokenizer)
    front = pivot if cell.pivot.intact else None
    own = PivotedModel(model, token_ids, None) if front and _computes_itself(front, cell, quantization) else None
    pivoted = PivotedModel(model, token_ids, front, cell.kv, codebook, own)
    check_cache(pivoted)
    digest = search.digest if search else None
    return Built(pivoted, source_hash, quantization, backends_of(model), residual, digest)


def _loaded(cell: CellSpec, load: Loader) -> PreTrainedModel:
    """What `pretrained` names, which can have a pivot, and can be rotated where the cell asks for it."""
    model = load(cell.model.pretrained, cell.model.revision)
    check_supported(model)
    check_resident(model)
    check_causal(model)
    if cell.weights.rotate:
        check_rotatable(model)
    return model


def _scaled(
    model: PreTrainedModel, cell: CellSpec, search: AWQSearch, pivot: PivotKV | None, shelf: Shelf | None
) -> PreTrainedModel:
    """`model`, or a copy of it, with the scales of `search`. Raises PivotError where the pivot is from elsewhere."""
    if pivot is not None:
        raise PivotError("weights=awq captures the pivot after its scales are applied; drop pivot=FILE, reference")
    check_clips(search, linear_layers(model))
    model = _ours(model, cell, shelf)
    apply_scales(model, search)
    return model


def _in_basis(
    pivot: PivotKV,
    model: PreTrainedModel,
    cell: CellSpec,
    quantization: dict[str, Any] | None,
    rotation: Rotation | None,
    compared: Compared,
    load: Loader,
) -> tuple[PivotKV, float | None]:
    """`pivot` in the basis of a checkpoint's values; and how far the checkpoint is from its reference."""
    checkpoint, reference = cell.model.pretrained, cell.model.reference
    if _is_trained_here(pivot, cell):
        return pivot, compared.residual

    def tensors_of(name: str) -> TensorSource:
        held = HeldTensors(name, load(name, "main").state_dict()) if name == REFERENCE_IN_MEMORY else None
        return held or files_of(name)

    if rotation is not None:
        rules = rules_of(quantization)
        return in_rotated_basis(pivot, model, rotation, checkpoint, reference, rules, tensors_of)
    if quantization is None:
        return pivot, compared.residual
    method = writer_of(quantization)
    pivot, residual = in_basis_of(pivot, model, method, checkpoint, reference, compared.unscaled, tensors_of)
    return pivot, compared.residual if residual is None else residual


def _computes_itself(pivot: PivotKV, cell: CellSpec, quantization: dict[str, Any] | None) -> bool:
    """Whether the evaluated model, in full precision, gives the rows of `pivot` itself where they are not captured."""
    quantized = quantization is not None or cell.weights.method != "none" or cell.weights.rotate
    rounded = cell.activations.bits < 16 or cell.kv.bits < 16
    elsewhere = pivot.long is not None or pivot.fingerprint.calibrated is not None or cell.model.reference
    return not (quantized or rounded or elsewhere)


def _is_trained_here(pivot: PivotKV, cell: CellSpec) -> bool:
    """Calibrated rows are in the basis of the one model they were trained for, which check_calibrated asks for."""
    return pivot.fingerprint.calibrated is not None and not cell.pivot.transfer


def _source_hash(model: PreTrainedModel) -> str:
    """Of the weights as they were loaded; of packed layers what they hold, not how a backend lays it out."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    packed = quantized_layers(model)
    if not packed:
        return weight_hash(tensors)
    plain = weight_hash([(name, tensor) for name, tensor in tensors if ".kernel." not in name])
    parts = [plain, *(f"{name} {layer.digest}" for name, layer in packed.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _ours(model: PreTrainedModel, cell: CellSpec, shelf: Shelf | None) -> PreTrainedModel:
    """`model`, or a copy where it is not ours to change."""
    shared = cell.model.pretrained == IN_MEMORY or (shelf is not None and shelf.holds(model))
    return copy.deepcopy(model) if shared else model


def _evaluated_once(
    model: PreTrainedModel, cell: CellSpec, search: AWQSearch | None, shelf: Shelf | None
) -> PreTrainedModel:
    if shelf is None:
        return _evaluated(model, cell, search)
    if quantized_layers(model) and cell.activations.bits < 16:
        shelf.clear()  # input stages are put into the packed model itself
    key = cell.weights, cell.activations, cell.backend
    return shelf.made(model, key, lambda: _evaluated(model, cell, search, shelf))


def _evaluated(
    model: PreTrainedModel, cell: CellSpec, search: AWQSearch | None, shelf: Shelf | None = None
) -> PreTrainedModel:
    """The model that answers: rotated, quantized, with input stages, as the cell says; packed layers as they are."""
    if quantized_layers(model):
        if cell.activations.bits < 16:
            apply_stages(model, None, cell.activations)
        return model
    rotation = None
    if cell.weights.rotate:
        model = _ours(model, cell, shelf)
        rotation = rotate(model)
    if cell.weights.method == "none" and cell.activations.bits == 16 and rotation is None:
        return model
    stages = stage_specs(list(linear_layers(model)), rotation, cell.activations)
    if cell.weights.method == "none":
        return quantized_model(model, None, stages=stages)
    return quantize(model, cell.weights, cell.backend, search, stages)


def quantize(
    model: PreTrainedModel,
    weights: WeightSpec,
    backend: str = "auto",
    search: AWQSearch | None = None,
    stages: Mapping[str, StageSpec] | None = None,
) -> PreTrainedModel:
    """`model` with its decoder's linear layers quantized as `weights` says; `model` itself is unchanged.

    `search`: whose clips are applied first; its scales must be in `model` already. `stages`: of the layers' inputs.
    """
    if weights.bits is None or weights.group_size is None:
        raise ConfigError("quantized weights need bits and group_size")
    bits, size, clips = weights.bits, weights.group_size, search.clips if search else {}

    def quantizer(matrix: Tensor, name: str) -> QuantizedWeight:
        return quantize_rtn(clipped(matrix, clips.get(name)), bits, size, weights.symmetric_formula, name)

    return quantized_model(model, quantizer, backend, stages)
