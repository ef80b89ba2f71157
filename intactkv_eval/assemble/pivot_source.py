"""Where a cell's pivot comes from: its tokens, and its KV from a file, the store, or a full-precision model.

Knows models and cells; neither changes a model nor quantizes one.
"""

import gc
import logging
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.assemble.checkpoint_info import quantization_in_memory
from intactkv_eval.assemble.checks import check_kept_rows
from intactkv_eval.assemble.source import Loader, ModelSource
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.compat.rope_length import rope_by_length
from intactkv_eval.errors import PivotError
from intactkv_eval.model.structure import check_resident
from intactkv_eval.pivot import store
from intactkv_eval.pivot.auto import tokens_of
from intactkv_eval.pivot.capture import capture, check_supported, fingerprint_of
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.awq_search import AWQSearch

logger = logging.getLogger(__name__)


class Front(NamedTuple):
    """The tokens in front of every request, and their KV where it comes from a file or a reference.

    token_ids: the pivot tokens. kv: None where the evaluated model's own source captures it, or computes the tokens.
    is_file: whether a PivotKV file was named.
    """

    token_ids: tuple[int, ...]
    kv: PivotKV | None
    is_file: bool


def resolve_front(cell: CellSpec, source: ModelSource) -> Front:
    """The tokens of a cell's pivot, and their KV from its file or its reference, which is loaded and freed again.

    Raises PivotError, ConfigError, DataError.
    """
    if cell.pivot.kind == "kv_file":
        pivot = PivotKV.load(Path(cell.pivot.source))
        check_kept_rows(cell, len(pivot.token_ids))
        return Front(pivot.token_ids, pivot, is_file=True)
    token_ids = _tokens_in_front(cell, source)
    check_kept_rows(cell, len(token_ids))
    if cell.pivot.intact and cell.model.reference:
        return Front(token_ids, _pivot_of_reference(cell, token_ids, source), is_file=False)
    return Front(token_ids, None, is_file=False)


def _pivot_of_reference(cell: CellSpec, token_ids: tuple[int, ...], source: ModelSource) -> PivotKV:
    """From the store, or from the reference itself."""
    reference = str(cell.model.reference)
    identity = None if reference in source.modified else store.source_identity(reference, "main")
    kept = store.find(identity, cell.model.dtype, token_ids)
    if kept is not None and _is_whole(kept, source.config):
        logger.info("the pivot KV of %s is taken from the store; the model is not loaded", reference)
        return kept
    model = _full_precision(reference, "main", source.load)
    pivot = captured(model, reference, cell, token_ids, modified=source.modified)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return pivot


def _full_precision(name: str, revision: str, load: Loader) -> PreTrainedModel:
    """A model to capture or search in. Raises PivotError where it is quantized, UnsupportedModelError."""
    model = load(name, revision)
    if quantization_in_memory(model).summary is not None:
        raise PivotError(f"{name} is itself quantized: name the full-precision model with reference=...")
    check_supported(model)
    check_resident(model)
    return model


def captured(
    model: PreTrainedModel,
    name: str,
    cell: CellSpec,
    token_ids: tuple[int, ...],
    search: AWQSearch | None = None,
    modified: Collection[str] = (),
) -> PivotKV:
    """What `model` computes, or what it computed when it was kept under `name`.

    search: whose scales are in the model. modified: names whose models are not what their files alone say; nothing is
    kept under these.
    """
    revision = "main" if name == cell.model.reference else cell.model.revision
    identity = None if name in modified else store.source_identity(name, revision)
    fingerprint = fingerprint_of(model, revision)
    if search is not None:
        identity = identity and f"{identity} awq_search {search.digest}"
        fingerprint = fingerprint.model_copy(update={"basis": f"awq-search:{search.digest}"})
    kept = store.find(identity, cell.model.dtype, token_ids)
    if kept is not None and kept.fingerprint == fingerprint and _is_whole(kept, model.config):
        return kept
    pivot = capture(model, token_ids, fingerprint)
    store.keep(pivot, identity, cell.model.dtype)
    return pivot


def _is_whole(pivot: PivotKV, config: PretrainedConfig) -> bool:
    """Whether `pivot` has rows for long texts too where the model has other RoPE frequencies for these."""
    rope = rope_by_length(config)
    return pivot.long is not None or rope.border is None or rope.grows


def _tokens_in_front(cell: CellSpec, source: ModelSource) -> tuple[int, ...]:
    """The tokens of a pivot that is no PivotKV file. Raises PivotError, DataError."""
    if cell.pivot.source == "auto" and source.checkpoint.summary is not None and cell.model.reference is None:
        raise PivotError(
            f"pivot=auto is searched in the full-precision model, and {cell.model.pretrained} is quantized: name it "
            "with reference=..., or search first: intactkv pivots MODEL --out FILE.json, then pivot=FILE.json"
        )
    name = cell.model.reference or cell.model.pretrained
    revision = "main" if cell.model.reference else cell.model.revision
    known = None if name in source.modified else (name, revision, cell.model.dtype)

    def load() -> PreTrainedModel:
        return _full_precision(name, revision, source.load)

    return tokens_of(cell.pivot, source.tokenizer, source.vocabulary, known, load, source.chat)
