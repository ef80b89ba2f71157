"""load_cell: from a cell and the source of its models to the model that is evaluated.

    front tokens -> model, as its files say -> pivot in the model's basis -> quantized model

Each step hands on one value. Knows models and cells; no lm_eval.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.assemble.chat_date import head_record
from intactkv_eval.assemble.checks import (
    check_belongs,
    check_cache,
    check_calibrated,
    check_codebook,
    check_origin,
)
from intactkv_eval.assemble.evaluated_model import evaluated_model
from intactkv_eval.assemble.loaded_model import LoadedModel, load_model, with_scales
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.assemble.pivot_basis import in_model_basis, is_trained_here
from intactkv_eval.assemble.pivot_source import Front, captured, resolve_front
from intactkv_eval.assemble.source import ModelSource
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.model.linear import backends_of
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.kv import PivotKV


class Built(NamedTuple):
    """The model of a cell, and what identifies the weights it was made from.

    quantization: what the checkpoint says of its own, None for one in full precision. backends: how many layers each
    kernel runs. basis_residual: how far a quantized checkpoint is from its reference.
    """

    pivoted: PivotedModel
    source_hash: str
    quantization: dict[str, Any] | None
    backends: dict[str, int]
    basis_residual: float | None = None
    search_digest: str | None = None


def load_cell(cell: CellSpec, source: ModelSource, models: ModelCache | None = None) -> Built:
    """Load the model of a cell, with its pivot in front.

    A reference is loaded for its pivot first and freed before `pretrained` is loaded.

    Args:
        cell: The cell.
        source: Where its models come from (open_source.py makes one of a folder or a hub id).
        models: Keeps models for the next cell. A model that lies there is never changed.

    Raises:
        ConfigError, PivotError, CheckpointError, UnsupportedModelError: Each with the fix.
    """
    front = resolve_front(cell, source)
    codebook = None if cell.kv.codebook is None else Codebook.load(Path(cell.kv.codebook))
    check_origin(cell, source.checkpoint.summary, needs_pivot=cell.pivot.intact and front.kv is None)
    loaded = load_model(cell, source)
    if codebook is not None:
        check_codebook(codebook, loaded.model, cell, loaded.quantization)
    loaded = with_scales(loaded, front, cell, models)
    pivot, residual = place_pivot(front, loaded, cell, source)
    model = evaluated_model(cell, loaded, models)
    if pivot is not None and front.is_file and front.kv is not None:
        check_calibrated(front.kv, model, cell, source.tokenizer)
    own = None
    if pivot is not None and _computes_itself(pivot, cell, loaded):
        own = PivotedModel(model, front.token_ids, None)
    pivoted = PivotedModel(model, front.token_ids, pivot, cell.kv, codebook, own)
    check_cache(pivoted)
    digest = None if loaded.search is None else loaded.search.digest
    return Built(pivoted, loaded.source_hash, loaded.quantization, backends_of(model), residual, digest)


def place_pivot(
    front: Front, loaded: LoadedModel, cell: CellSpec, source: ModelSource
) -> tuple[PivotKV | None, float | None]:
    """The pivot in the basis of the model's values, None where the cell has none; and Built.basis_residual."""
    pivot, residual = front.kv, None
    if pivot is not None:
        pivot, compared = check_belongs(pivot, loaded.model, cell, loaded.quantization, source.checkpoint.rotation)
        pivot, residual = in_model_basis(pivot, loaded, cell, source, compared)
    if not cell.pivot.intact:
        return None, residual
    if pivot is None:
        pivot = captured(loaded.model, cell.model.pretrained, cell, front.token_ids, loaded.search, source.modified)
    if cell.weights.rotate and not is_trained_here(pivot, cell):
        pivot = to_rotated(pivot)
    if cell.pivot.source == "prompt":
        pivot = replace(pivot, head=head_record(source.tokenizer, source.chat))
    return pivot, residual


def _computes_itself(pivot: PivotKV, cell: CellSpec, loaded: LoadedModel) -> bool:
    """Whether the evaluated model, in full precision, gives the rows of `pivot` itself where they are not captured."""
    quantized = loaded.quantization is not None or cell.weights.method != "none" or cell.weights.rotate
    rounded = cell.activations.bits < 16 or cell.kv.bits < 16
    elsewhere = pivot.long is not None or pivot.fingerprint.calibrated is not None or cell.model.reference
    return not (quantized or rounded or elsewhere)
