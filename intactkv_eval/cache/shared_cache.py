"""SharedCache: the KV of one prefix in front of many rows, without a copy for each; for a single forward.

Every layer keeps the whole prefix, sliding ones too: the windows are the mask's. Appending makes new tensors, so that
the prefix itself is never written to; they live no longer than their layer needs them, unless they are to be a prefix
themselves. Rows are quantized as in PivotCache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from intactkv_eval.cache.quantizers import quantize_rows
from intactkv_eval.config import KVSpec

LayerKV = tuple[Tensor, Tensor]
"""Keys and values [1, H, S, D] of one layer."""


class SharedCache(DynamicCache):
    """prefix: keys and values of each layer, possibly none. positions: [B, T] of the tokens that will be written.

    keep: whether `rows` is to hold them afterwards.
    """

    def __init__(
        self, prefix: Sequence[LayerKV], batch_size: int, kv: KVSpec, positions: Tensor, keep: bool = False
    ) -> None:
        super().__init__()
        self._kv, self._positions, self._keep = kv, positions, keep
        for keys, values in prefix:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (part.expand(batch_size, -1, -1, -1) for part in (keys, values))
            self.layers.append(layer)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Append rows [B, H, T, D], quantized where the cell says so; returns all rows of the layer."""
        if self._kv.bits < 16:
            key_states = quantize_rows(key_states, self._kv, self._positions, self._kv.rotate)
            value_states = quantize_rows(value_states, self._kv, self._positions)
        if self._keep:
            updated: LayerKV = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return updated
        if layer_idx >= len(self.layers):
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=2), torch.cat([layer.values, value_states], dim=2)

    def rows(self) -> list[LayerKV]:
        """Keys and values of each layer, the prefix among them: what may stand in front of other rows."""
        return [(layer.keys, layer.values) for layer in self.layers]
