"""Capture: one forward of the full-precision model over the pivot tokens, and the hash of who it was.

Knows no quantizer; what it returns does not share storage with the model.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.compat.rope_length import as_in_text_of, forget_long_texts, rope_by_length
from intactkv_eval.compat.tensor_parts import plain_numbers, weight_hash
from intactkv_eval.compat.transformers_api import takes_cache, unknown_cache_argument
from intactkv_eval.errors import PivotError, UnsupportedModelError
from intactkv_eval.pivot.identity import Fingerprint
from intactkv_eval.pivot.kv import Computed, PivotKV
from intactkv_eval.pivot.layer_kinds import why_not
from intactkv_eval.pivot.weight_sample import weight_sample


def capture(model: PreTrainedModel, token_ids: tuple[int, ...], fingerprint: Fingerprint) -> PivotKV:
    """The KV [H, P, D] a layer and the logits [P, V] of `token_ids` at positions 0..P-1, and the model's sample.

    Where the model has two sets of RoPE frequencies, both are captured.

    Raises UnsupportedModelError for a model without a plain KV cache, PivotError for NaN or a pivot too long.
    """
    check_supported(model)
    weights = {name: sampled.numbers for name, sampled in weight_sample(model).items()}
    rope, long = rope_by_length(model.config), None
    if rope.border is not None:
        forget_long_texts(model)
        if not rope.grows:
            with as_in_text_of(model, rope.border + 1):
                long = computed(model, token_ids)
    return PivotKV(token_ids, *computed(model, token_ids), fingerprint, weights, long)


@torch.no_grad()
def computed(model: PreTrainedModel, token_ids: tuple[int, ...]) -> Computed:
    """One forward over `token_ids`; its tensors are copies. Also of models that are quantized already.

    Raises UnsupportedModelError for a model without a plain KV cache, PivotError for more tokens than it has room for.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and len(token_ids) >= limit:
        raise PivotError(f"a pivot of {len(token_ids)} tokens leaves no room in a model of {limit} positions")
    # Without the config every layer keeps all rows, sliding ones too: they cut their window when a cache is made.
    cache = CountingCache()
    inputs = torch.tensor([token_ids], device=model.get_input_embeddings().weight.device)
    logits = run_with_cache(model, cache, inputs).logits[0]
    rows: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    if not rows or any(key is None or key.ndim != 4 or key.shape[2] != len(token_ids) for key, _ in rows):
        raise UnsupportedModelError(f"{type(model).__name__} does not fill a KV cache [B, H, T, D] in every layer")
    keys, values = (tuple(row[0].clone() for row in kind) for kind in zip(*rows, strict=True))
    return Computed(keys, values, logits.clone())


def check_supported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model that the pivot cannot be given to, by name and with the reason."""
    name = f"{type(model).__name__} ({model.config.model_type})"
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: it reads a text with its encoder, and the tokens in front of a text are in "
            "no KV cache. Only decoder-only causal language models are supported; use --model hf"
        )
    reason = why_not(model.config.get_text_config(decoder=True))
    if reason is not None:
        raise UnsupportedModelError(f"{name} {reason}; use --model hf")
    if not takes_cache(model):
        raise UnsupportedModelError(f"{name} takes no KV cache: {unknown_cache_argument(type(model).forward)}")


def fingerprint_of(model: PreTrainedModel, revision: str) -> Fingerprint:
    """The identity of a full-precision model as it is loaded."""
    return Fingerprint(
        model=model.name_or_path or type(model).__name__,
        revision=revision,
        weight_hash=weight_hash(model.named_parameters()),
        embedding_hash=embedding_hash(model),
        dtype=str(model.dtype).removeprefix("torch."),
        embedding_sample=embedding_sample(model),
    )


def embedding_hash(model: PreTrainedModel) -> str:
    """The hash of the input embeddings alone, which no weight-only quantizer of ours changes."""
    return weight_hash([("embeddings", model.get_input_embeddings().weight)])


def embedding_sample(model: PreTrainedModel) -> tuple[float, ...]:
    """256 evenly spaced numbers of the input embeddings."""
    flat = plain_numbers(model.get_input_embeddings().weight).reshape(-1)
    return tuple(flat[:: max(1, flat.numel() // 256)][:256].to(torch.float64).tolist())
