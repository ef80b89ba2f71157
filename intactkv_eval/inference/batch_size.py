"""How many rows fit: batch_size=auto by counting bytes, on a CPU as on a GPU. No trial runs."""

from weakref import WeakKeyDictionary

import psutil
import torch
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import largest_number
from intactkv_eval.errors import ConfigError, UnsupportedModelError
from intactkv_eval.pivot.capture import computed

MAX_AUTO_ROWS = 64
_KV_BYTES: "WeakKeyDictionary[PreTrainedModel, int]" = WeakKeyDictionary()
_SHARE = 0.4  # of the free memory; the rest is for what the count leaves out


def check_batch_size(value: int | str | None) -> int | str:
    """A positive whole number, "auto" or "auto:N" as lm_eval knows them (N is not needed here: every batch is counted).

    Raises ConfigError for anything else.
    """
    text = str(1 if value is None else value)
    if text == "auto" or (text.startswith("auto:") and text[5:].replace(".", "", 1).isdigit()):
        return "auto"
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise ConfigError(f"batch_size={value!r}: use a whole number from 1, or auto")


def rows_that_fit(
    model: PreTrainedModel, tokens: int, device: torch.device, most: int | None = None, all_logits: bool = True
) -> int:
    """The rows of `tokens` tokens that fit in the free memory of `device`, from 1 to `most`.

    all_logits: whether the forward makes logits of every token.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(min(max(free * _SHARE // bytes_per_row(model, tokens, all_logits), 1), most or MAX_AUTO_ROWS))


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Of KV, in all layers: what a forward over one token caches, since heads and widths may differ by layer."""
    if model not in _KV_BYTES:
        try:
            keys, values, _ = computed(model, (0,))
        except UnsupportedModelError:  # it is run without a cache then
            return 0
        _KV_BYTES[model] = sum(part.numel() * part.element_size() for part in (*keys, *values))
    return _KV_BYTES[model]


def bytes_per_row(model: PreTrainedModel, tokens: int, all_logits: bool = True) -> int:
    """KV cache, attention scores of one layer, activations; logits, where they are made, in two dtypes."""
    config = model.config.get_text_config(decoder=True)
    size = torch.finfo(model.dtype).bits // 8
    width = max(largest_number(config, "intermediate_size") or 4 * config.hidden_size, config.hidden_size)
    per_token = kv_bytes_per_token(model) + (config.vocab_size * (size + 4) if all_logits else 0)
    per_token += (largest_number(config, "num_attention_heads") or 1) * tokens * 4 + 6 * width * size
    return int(max(tokens, 1) * per_token)
