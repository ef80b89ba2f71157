"""How a decoder layer is called inside its model, noted in one forward, so that it can be run alone afterwards.

What a layer is given besides hidden states (positions, masks) depends on the length of the row and on the cache; the
cache is handed in anew, since attention writes to it. Knows no quantizer and no pivot.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intactkv_eval.compat.cache_use import CountingCache, check_layer_call
from intactkv_eval.compat.transformers_api import Cache
from intactkv_eval.model.hooks import hidden_of


class LayerCall(NamedTuple):
    """All that a decoder layer was called with, but for its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, "LayerCall"]:
        """The hidden states [1, T, C] of a call as a forward pre-hook sees it, and the rest of it."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        return hidden, cls(tuple(args[1:]), {key: value for key, value in kwargs.items() if key != "hidden_states"})

    def run(self, layer: nn.Module, hidden: Tensor, cache: CountingCache | None, device: torch.device) -> Tensor:
        """What `layer`, which is on `device`, makes of `hidden` [1, T, C] with `cache` in the place of its own."""
        placed = [_placed(value, cache, device, hidden.dtype) for value in self.args]
        named = {key: _placed(value, cache, device, hidden.dtype) for key, value in self.kwargs.items()}
        before = sum(cache.rows_given.values()) if cache is not None else 0
        output = hidden_of(layer(hidden.to(device), *placed, **named))
        if cache is not None:
            check_layer_call(layer, cache, before, hidden.shape[1])
        return output


def _placed(value: Any, cache: Cache | None, device: torch.device, dtype: torch.dtype) -> Any:
    """`value` on `device` with `cache` for any cache in it. (A closure that calls itself would live until gc runs.)"""
    if isinstance(value, Cache):
        return cache
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if type(value) in {tuple, list}:
        return type(value)(_placed(part, cache, device, dtype) for part in value)
    return value
