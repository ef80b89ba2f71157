"""SharedPrefixCache: the KV of one prefix in front of many rows, without a copy for each; for a single forward.

Every layer keeps the whole prefix, sliding ones too: the windows are the mask's. Appending makes new tensors, so that
the prefix itself is never written to; they live no longer than their layer needs them, unless they are to be a prefix
themselves. Rows are quantized as in PivotCache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from intactkv_eval.compat.cache_use import CountingCache
from intactkv_eval.compat.transformers_api import DynamicLayer
from intactkv_eval.kv_quant.quantizer import KVQuantizer, LayerKV


class SharedPrefixCache(CountingCache):
    """prefix: keys and values [1, H, S, D] of each layer, possibly none.

    kv_quantizer: what quantizes rows, None for nothing. positions: [B, T] of the tokens that will be written.
    keep: whether `rows` is to hold them afterwards.
    """

    def __init__(
        self,
        prefix: Sequence[LayerKV],
        batch_size: int,
        kv_quantizer: KVQuantizer | None,
        positions: Tensor,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self._writer, self._positions, self._keep = kv_quantizer, positions, keep
        for keys, values in prefix:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = (part.expand(batch_size, -1, -1, -1) for part in (keys, values))
            self.layers.append(layer)

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Append rows [B, H, T, D], quantized where the cell says so; returns all rows of the layer."""
        if self._writer is not None:
            key_states, value_states = self._writer.write(key_states, value_states, layer_idx, self._positions)
        if self._keep:
            return super().store(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx >= len(self.layers):
            return key_states, value_states
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=2), torch.cat([layer.values, value_states], dim=2)

    def rows(self) -> list[LayerKV]:
        """Keys and values of each layer, the prefix among them: what may stand in front of other rows."""
        return [(layer.keys, layer.values) for layer in self.layers]
