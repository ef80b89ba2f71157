"""The model that `pretrained` names, as its files say, and what identifies it."""

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from intactkv_eval.assemble.checkpoint_info import as_held
from intactkv_eval.assemble.checks import IN_MEMORY
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.assemble.pivot_source import Front
from intactkv_eval.assemble.source import ModelSource
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.compat.tensor_parts import weight_hash
from intactkv_eval.errors import PivotError
from intactkv_eval.inference.causality import check_causal
from intactkv_eval.model.linear import quantized_layers
from intactkv_eval.model.structure import check_resident, linear_layers
from intactkv_eval.pivot.capture import check_supported
from intactkv_eval.quantize.awq_search import AWQSearch, apply_scales, check_clips, load_search
from intactkv_eval.quantize.rotation import check_rotatable


@dataclass(frozen=True)
class LoadedModel:
    """A model before the cell quantizes it.

    Args:
        model: The model.
        source_hash: A hash of its weights as they were loaded.
        quantization: What its checkpoint and its layers say of their quantization, None in full precision.
        search: llm-awq's search result of the cell, None where it has none.
    """

    model: PreTrainedModel
    source_hash: str
    quantization: dict[str, Any] | None
    search: AWQSearch | None = None


def load_model(cell: CellSpec, source: ModelSource) -> LoadedModel:
    """Load what `pretrained` names; it can have a pivot, and can be rotated where the cell asks for it."""
    model = source.load(cell.model.pretrained, cell.model.revision)
    check_supported(model)
    check_resident(model)
    check_causal(model)
    if cell.weights.rotate:
        check_rotatable(model)
    search = None if cell.weights.search is None else load_search(Path(cell.weights.search))
    return LoadedModel(model, _source_hash(model), as_held(source.checkpoint.summary, model), search)


def with_scales(loaded: LoadedModel, front: Front, cell: CellSpec, models: ModelCache | None) -> LoadedModel:
    """The model with the scales of its search result applied; as it is where it has none.

    Raises PivotError where the pivot was captured elsewhere, before these scales.
    """
    if loaded.search is None:
        return loaded
    if front.kv is not None:
        raise PivotError("weights=awq captures the pivot after its scales are applied; drop pivot=FILE, reference")
    check_clips(loaded.search, linear_layers(loaded.model))
    model = own_copy(loaded.model, cell, models)
    apply_scales(model, loaded.search)
    return replace(loaded, model=model)


def own_copy(model: PreTrainedModel, cell: CellSpec, models: ModelCache | None) -> PreTrainedModel:
    """`model`, or a copy where others hold it too."""
    is_shared = cell.model.pretrained == IN_MEMORY or (models is not None and models.owns(model))
    return copy.deepcopy(model) if is_shared else model


def _source_hash(model: PreTrainedModel) -> str:
    """Of the weights as they were loaded; of packed layers what they hold, not how a backend lays it out."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    packed = quantized_layers(model)
    if not packed:
        return weight_hash(tensors)
    plain = weight_hash([(name, tensor) for name, tensor in tensors if ".kernel." not in name])
    parts = [plain, *(f"{name} {layer.digest}" for name, layer in packed.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
