"""What a run records of its cell, beside what lm_eval records of itself. Values that JSON can hold, nothing else."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from intactkv_eval import __version__
from intactkv_eval.assemble.load_cell import Built
from intactkv_eval.cell.formulas import current, formulas_of
from intactkv_eval.cell.records import SPEED_ONLY
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.chat.bos_text import bos_changes_tokens
from intactkv_eval.chat.templates import template_hash
from intactkv_eval.kv_quant.latent import holds_latent
from intactkv_eval.model.structure import text_config
from intactkv_kernels.native import library


def cell_identity(cell: CellSpec, hf_arguments: Mapping[str, Any], built: Built, tokenizer: Any) -> dict[str, Any]:
    """All that decides a run's answers: two runs of one identity answer every request alike."""
    pivoted, pivot = built.pivoted, built.pivoted.pivot
    is_calibrated = pivot is not None and pivot.fingerprint.calibrated is not None
    chat = current(["chat"]) if bos_changes_tokens(tokenizer) else {}
    return {
        "cell": cell.model_dump(mode="json"),
        "formulas": {**formulas_of(cell, built.quantization, is_calibrated), **chat},
        "symmetric_formula": cell.weights.symmetric_formula,
        "hf_arguments": {key: str(value) for key, value in sorted(hf_arguments.items()) if key not in SPEED_ONLY},
        "dtype": str(pivoted.model.dtype).removeprefix("torch."),
        "source_hash": built.source_hash,
        "quantization": built.quantization,
        "backends": built.backends,
        "awq_search": built.search_digest,
        "kv_codebook": pivoted.codebook.record() if pivoted.codebook is not None else None,
        "model_type": pivoted.model.config.model_type,
        "rope_by_length": asdict(pivoted.rope) if pivoted.rope.border is not None else None,
        "pivot_tokens": list(pivoted.token_ids),
        "pivot_text": [tokenizer.convert_ids_to_tokens(token) for token in pivoted.token_ids],
        "chat_template_hash": template_hash(getattr(tokenizer, "chat_template", None)),
        "pivot_fingerprint": pivot.fingerprint.model_dump(exclude={"embedding_sample"}) if pivot is not None else None,
    }


def facts_of_model(model: PreTrainedModel, built: Built | None) -> dict[str, Any]:
    """What else a run tells of the model that answered.

    kv_cache_is_latent: whether it caches a latent (MLA). basis_residual: how far a quantized checkpoint is from its
    reference. c_kernel: whether the compiled C kernels ran; None where no layer runs on the CPU's.
    """
    return {
        "kv_cache_is_latent": bool(getattr(text_config(model), "kv_lora_rank", 0)) and holds_latent(model),
        "basis_residual": built.basis_residual if built else None,
        "c_kernel": library() is not None if built and "cpu" in built.backends else None,
    }


def versions() -> dict[str, str]:
    """Of what computed the run."""
    return {name: version(name) for name in ("torch", "transformers", "lm_eval")} | {"intactkv_eval": __version__}
