"""Whether a model is causal, tried: no logits may change with a token behind them, or they are no likelihoods of it.

Encoders that transformers loads as causal language models (BERT) look ahead, and some wrappers do in their prefix.
"""

import torch
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference.padding_probe import disagreement, is_tested
from intactkv_eval.model.activation_quant import activations_off

_TOKENS = 6


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where the logits [T, V] of a text's first tokens change with its last token."""
    if is_tested(model):
        return
    embeddings = model.get_input_embeddings().weight
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(embeddings.shape[0], (1, _TOKENS), generator=draw)
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + 1) % embeddings.shape[0]
    with activations_off(model):
        both = [
            model(input_ids=row.to(embeddings.device), **cache_argument(model, None)).logits for row in (ids, other)
        ]
    one, two = (logits[0, :-1] for logits in both)
    reason = disagreement(two.double(), one.double(), model.dtype)
    if reason is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}) is not causal: the logits of a text's first tokens "
            f"change with its last one ({reason}), so they are no likelihoods of what follows. It is an encoder, or "
            "its config does not say is_decoder=true; name a causal language model"
        )
