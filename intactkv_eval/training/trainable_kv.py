"""The pivot's rows as the only parameters: a master copy is trained, and cast to the model's dtype where it is used."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.kv_cache.single_use import SingleForwardCache
from intactkv_eval.kv_quant.quantizer import KVQuantizer
from intactkv_eval.pivot.kv import PivotKV


@dataclass(frozen=True, eq=False)
class Rows:
    """Keys and values [H, P, D] of each layer, as PivotCache takes them."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def only(self, layer: int) -> "Rows":
        """The same, of which one layer's alone carry a gradient."""

        def chosen(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(part if index == layer else part.detach() for index, part in enumerate(parts))

        return Rows(chosen(self.keys), chosen(self.values))


def run_behind(
    module: Any,
    model: PreTrainedModel,
    rows: Rows,
    devices: Sequence[torch.device],
    body: Tensor,
    kv_quantizer: KVQuantizer | None = None,
) -> Any:
    """`module`, which is `model` or its base, on the tokens [T] behind `rows`. devices: of the model's layers.

    kv_quantizer: what quantizes the cache's later rows, None for nothing.
    """
    ids = body[None].to(model.get_input_embeddings().weight.device)
    cache = SingleForwardCache(model.config, 1, kv_quantizer, rows, list(devices))
    return run_with_cache(module, cache, ids)


class TrainedRows:
    """Rows that start as `pivot`'s. dtype: of the master copy; devices: of each layer."""

    def __init__(self, pivot: PivotKV, dtype: torch.dtype, devices: Sequence[torch.device]) -> None:
        self._pivot = pivot
        self._keys, self._values = (
            [
                part.detach().to(device, dtype, copy=True).requires_grad_()
                for part, device in zip(kind, devices, strict=True)
            ]
            for kind in (pivot.keys, pivot.values)
        )

    def parameters(self) -> list[Tensor]:
        """All that is trained, in a fixed order: keys and values of the first layer, of the second, ..."""
        return [part for pair in zip(self._keys, self._values, strict=True) for part in pair]

    def cast(self, dtype: torch.dtype) -> Rows:
        """The rows in the model's dtype; a gradient passes to the master copy."""
        return Rows(*(tuple(part.to(dtype) for part in kind) for kind in (self._keys, self._values)))

    def as_pivot(self) -> PivotKV:
        """The rows as they are now, in the dtype that the pivot has; its tokens, logits and fingerprint.

        They are trained in texts of the length of the conversations, so it has none for long texts.
        """
        kinds = []
        for trained, first in ((self._keys, self._pivot.keys), (self._values, self._pivot.values)):
            pairs = zip(trained, first, strict=True)
            kinds.append(tuple(part.detach().to(one.device, one.dtype, copy=True) for part, one in pairs))
        return replace(self._pivot, keys=kinds[0], values=kinds[1], long=None)

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor]) -> None:
        """Put saved numbers back."""
        for held, saved in zip(self.parameters(), parameters, strict=True):
            held.copy_(saved)
