"""PivotCache: a fresh cache for one call; pivot rows in front, exact, and every later row quantized as it is written.

A transformers DynamicCache in all else, so the model's own attention, masks and sliding windows work on it.
The captured PivotKV is copied in: the model may change this cache, never the capture.
"""

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from intactkv_eval.cache.quantizers import quantize_rows
from intactkv_eval.config import KVSpec
from intactkv_eval.errors import PivotError


class FrontRows(Protocol):
    """Rows [H, S, D] of each layer that stand in front: a PivotKV, or a pivot with a start that requests share.

    [B, H, S, D] where each row of a batch has its own, left-padded.
    """

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """Of each layer."""
        ...

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Of each layer."""
        ...


class PivotCache(DynamicCache):
    """The KV cache [B, H, P + T, D] of one call.

    devices: of each layer, where its pivot rows go. padding: the left padding [B] of each row, so that `kv.keep`
    counts real tokens.
    Raises PivotError where the PivotKV has another number of layers than the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        batch_size: int,
        kv: KVSpec,
        pivot: FrontRows | None = None,
        devices: list[torch.device] | None = None,
        padding: Tensor | None = None,
    ) -> None:
        super().__init__(config=config)
        self._kv = kv
        self._padding = padding
        if pivot is None:
            return
        if devices is None or len(devices) != len(pivot.keys):
            raise PivotError(
                f"the PivotKV has {len(pivot.keys)} layers, the model {len(devices or ())}: it is another model's"
            )
        for layer, (key, value, device) in enumerate(zip(pivot.keys, pivot.values, devices, strict=True)):
            keys, values = (part.to(device).expand(batch_size, *part.shape[-3:]).clone() for part in (key, value))
            super().update(keys, values, layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [B, H, T, D], quantized first where the cell says so; returns all rows of the layer."""
        if self._kv.bits < 16:
            positions = self._positions(self.get_seq_length(layer_idx), key_states)
            key_states = quantize_rows(key_states, self._kv, positions, self._kv.rotate)
            value_states = quantize_rows(value_states, self._kv, positions)
        updated: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def _positions(self, start: int, states: Tensor) -> Tensor:
        """[B or 1, T]: the places of new tokens among their row's real ones."""
        columns = torch.arange(start, start + states.shape[2], device=states.device)
        padding = self._padding if self._padding is not None else torch.zeros(1, dtype=torch.long)
        return columns[None, :] - padding.to(states.device)[:, None]
