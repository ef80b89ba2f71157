"""Whether a model counts columns where others count tokens: padding between what is kept and a text then moves it.

    kept | padding | text   against   kept | text      the same next token, where only tokens count

Sliding windows and some models' ALiBi count so. The families of our tests are known; any other is tried, with as many
columns as are asked for, since a window shows itself beyond its end alone. Knows models; no pivot, no texts.
"""

import logging
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import CountingCache, generate_with_cache, run_with_cache
from intactkv_eval.compat.transformers_api import cache_layers
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference.generation.settings import plain_greedy
from intactkv_eval.model.activation_quant import activations_off
from intactkv_eval.model.families import FAMILIES
from intactkv_eval.model.structure import text_config

logger = logging.getLogger(__name__)

_AGREE = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative RMS of logits; 16 bits:
_AGREE_16_BITS = 8e-2
_KEPT, _TEXT = 24, 4  # tokens of the trial
_LEAST, _MOST = 256, 2048  # columns that are tried; the most where no number is asked for
TESTED = {name for name, family in FAMILIES.items() if family.shares_prefixes}  # by law 14's test
# What a model that cannot do what a trial asks of it may raise.
TRIAL_ERRORS = (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError, UnsupportedModelError)


def is_tested(model: PreTrainedModel) -> bool:
    """Whether this is transformers' own code of a family of our tests."""
    return type(model).__module__.startswith("transformers.") and model.config.model_type in TESTED


def disagreement(found: Tensor, expected: Tensor, dtype: torch.dtype) -> str | None:
    """What tells logits [N, V] (fp64) apart by more than the order of summation in `dtype`, or None."""
    expected, found = (part - part.mean(dim=1, keepdim=True) for part in (expected, found))
    worst = float(((found - expected).norm(dim=1) / expected.norm(dim=1)).square().mean().sqrt())
    allowed = _AGREE.get(dtype, _AGREE_16_BITS)
    return None if worst <= allowed else f"a trial gave other logits (relative difference {worst:.1e})"


class PaddingProbe:
    """What padding in the middle of a row does to `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._tried: dict[int, bool] = {}

    @cached_property
    def window(self) -> int | None:
        """The shortest sliding window among the layers, None where every layer sees all."""
        layers = cache_layers(self.model.config)
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

    def counted(self, columns: int) -> bool:
        """Whether padding changes answers in rows of so many columns; a trial goes up to the next power of two."""
        if self.window is not None and columns > self.window:
            return True
        if is_tested(self.model):
            return False
        size = max(_LEAST, 1 << (columns - 1).bit_length())
        size = size if self.window is None else min(size, self.window)
        if size not in self._tried:
            reason = self._difference(size)
            self._tried[size] = reason is not None
            if reason:
                logger.warning("rows of unlike lengths are not generated together with this model: %s", reason)
        return self._tried[size]

    @cached_property
    def counted_anywhere(self) -> bool:
        """Whether a window or a distance is counted so that transformers' cache does not tell of."""
        most = min(getattr(text_config(self.model), "max_position_embeddings", _MOST), _MOST)
        return self.counted(most if self.window is None else min(most, self.window))

    def _difference(self, columns: int) -> str | None:
        """Without activation quantizers: each token is rounded by itself, and rounding would drown a trial."""
        with torch.no_grad(), activations_off(self.model):
            try:
                expected, found = self._next(0), self._next(max(1, columns - _KEPT - _TEXT))
            except TRIAL_ERRORS as error:
                return f"{type(error).__name__}: {str(error)[:200]}"
        return disagreement(found.double(), expected.double(), self.model.dtype)

    def _next(self, padding: int) -> Tensor:
        """The logits [1, V] behind kept tokens, so many columns of padding, which are kept too, and a text."""
        embeddings = self.model.get_input_embeddings().weight
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(embeddings.shape[0], (1, _KEPT + _TEXT), generator=draw).to(embeddings.device)
        kept, text = ids[:, :_KEPT], ids[:, _KEPT:]
        cache = CountingCache(config=self.model.config)
        run_with_cache(self.model, cache, kept)
        held = [layer for layer in cache.layers if layer.keys is not None]  # others have no rows of their own
        for place, layer in enumerate(held if padding else ()):
            empty = (part.new_zeros(1, part.shape[1], padding, part.shape[3]) for part in (layer.keys, layer.values))
            cache.update(*empty, place)
        made = generate_with_cache(
            self.model,
            cache,
            torch.cat([kept, kept[:, :1].expand(1, padding), text], dim=1),
            attention_mask=torch.tensor([[1] * _KEPT + [0] * padding + [1] * _TEXT], device=ids.device),
            max_new_tokens=1,
            pad_token_id=0,
            **{**plain_greedy(), "return_dict_in_generate": True, "output_logits": True},
        )
        logits: Tensor = made.logits[0]
        return logits
