"""SharedCache: the KV of one prefix in front of many rows, without a copy for each; for a single forward.

Every layer keeps all rows, sliding ones too: the windows are the mask's. Appending makes new tensors, so that the
prefix itself is never written to. Rows behind it are quantized as in PivotCache.
"""

from collections.abc import Sequence

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from intactkv_eval.cache.quantizers import quantize_rows
from intactkv_eval.config import KVSpec

LayerKV = tuple[Tensor, Tensor]
"""Keys and values [1, H, S, D] of one layer."""


class SharedCache(DynamicCache):
    """prefix: keys and values of each layer, possibly none. positions: [B, T] of the tokens that will be written."""

    def __init__(self, prefix: Sequence[LayerKV], batch_size: int, kv: KVSpec, positions: Tensor) -> None:
        super().__init__()
        self._kv, self._positions = kv, positions
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
            key_states = quantize_rows(key_states, self._kv, self._positions)
            value_states = quantize_rows(value_states, self._kv, self._positions)
        updated: LayerKV = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return updated

    def rows(self) -> list[LayerKV]:
        """Keys and values of each layer, the prefix among them: what may stand in front of other rows."""
        return [(layer.keys, layer.values) for layer in self.layers]
