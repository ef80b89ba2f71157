"""SingleForwardCache: a PivotCache for one forward. Attention gets all rows, and none but the pivot's stay behind.

A forward that nothing goes on from would otherwise hold the KV of every layer until its end.
"""

from typing import Any

from torch import Tensor

from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.kv_quant.quantizer import LayerKV


class SingleForwardCache(PivotCache):
    """The pivot's rows, in front of whatever is written. Takes what PivotCache takes, a pivot among it."""

    def store(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> LayerKV:
        """All rows of the layer, the new ones [B, H, T, D] behind the pivot's; the cache is left as it was."""
        layer = self.layers[layer_idx]
        before = dict(vars(layer))
        rows = super().store(key_states, value_states, layer_idx, *args, **kwargs)
        vars(layer).update(before)
        return rows
