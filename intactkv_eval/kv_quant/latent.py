"""Whether what a model caches as keys and values are a latent and a rotated part of keys (MLA), found by running it.

DeepSeek's attention needs neither keys nor values of each head: it expands them from a latent row of the token, and
adds a part of the keys that all heads share and that alone is rotated. Newer releases of transformers cache the latent
as "keys" and the rotated part as "values"; older ones cache keys and values of each head. So it is tried: a value is
computed from its own token alone and holds no position, the rotated part does.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.structure import decoder_layers

_TRIED = 12  # positions
_SAME = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative RMS over positions of what holds none; with 16 bits:
_SAME_16_BITS = 5e-2


def holds_latent(model: PreTrainedModel) -> bool:
    """Whether what the first layer caches as values is one row for all heads and depends on its position."""
    _, values = rows_of_one_token(model)[0]
    return values.shape[1] == 1 and change_over_positions(values) > _SAME.get(model.dtype, _SAME_16_BITS)


def check_keys_are_cached(model: PreTrainedModel, scheme: str) -> None:
    """Raise UnsupportedModelError where a scheme that treats keys and values unlike gets neither of them."""
    if holds_latent(model):
        keys, values = rows_of_one_token(model)[0]
        raise UnsupportedModelError(
            f"kv_scheme={scheme} is not possible with {type(model).__name__}: what it caches are no keys and values "
            f"but a latent row of {keys.shape[-1]} numbers for each token and {values.shape[-1]} rotated numbers that "
            f"all heads share (MLA), from which it expands both. {scheme} would quantize the latent as keys and the "
            "rotated part as values; use kv_scheme=token_head, which rounds each row by itself"
        )


@torch.no_grad()
def rows_of_one_token(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [1, H, 12, D] that each layer caches of the same hidden states at 12 positions.

    Each decoder layer is given its first position's hidden states at all of them: attention sinks, learned positions
    and the like would change them from position to position.
    """

    def repeat(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        same = hidden[..., :1, :].expand_as(hidden).clone()
        return ((same, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": same})

    held = [layer.register_forward_pre_hook(repeat, with_kwargs=True) for layer in decoder_layers(model)[1]]
    cache = CountingCache()
    embeddings = model.get_input_embeddings().weight
    ids = torch.full((1, _TRIED), min(11, len(embeddings) - 1), device=embeddings.device)
    try:
        run_with_cache(model, cache, ids)
    finally:
        for hook in held:
            hook.remove()
    return [(layer.keys, layer.values) for layer in cache.layers]


def change_over_positions(rows: Tensor) -> float:
    """How much rows [1, H, T, D] differ over positions: RMS, relative to their own; 0 for rows of zeros."""
    wide = rows.double()
    size = wide.square().mean().sqrt()
    return float((wide - wide.mean(dim=2, keepdim=True)).square().mean().sqrt() / size) if size else 0.0
