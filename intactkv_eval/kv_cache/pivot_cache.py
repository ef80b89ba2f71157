"""PivotCache: a fresh cache for one call; pivot rows in front, exact, and every later row quantized as it is written.

A transformers DynamicCache in all else, so the model's own attention, masks and sliding windows work on it.
The captured PivotKV is copied in: the model may change this cache, never the capture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig

from intactkv_eval.compat.cache_use import CountingCache
from intactkv_eval.errors import PivotError
from intactkv_eval.kv_quant.quantizer import KVQuantizer, LayerKV


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


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """Rows [H, S, D] of each layer at the first positions, quantized as those of a cache are."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, front: FrontRows, kv_quantizer: KVQuantizer, devices: Sequence[torch.device]) -> "QuantizedRows":
        """The rows of `front`, as `kv_quantizer` stores them, each layer's on its device."""
        positions = torch.arange(front.keys[0].shape[1])[None]
        pairs = zip(front.keys, front.values, devices, strict=True)
        rows = [
            kv_quantizer.write(keys[None].to(device), values[None].to(device), layer, positions)
            for layer, (keys, values, device) in enumerate(pairs)
        ]
        return cls(tuple(keys[0] for keys, _ in rows), tuple(values[0] for _, values in rows))


class PivotCache(CountingCache):
    """The KV cache [B, H, P + T, D] of one call.

    kv_quantizer: of later rows, None for none. devices: of each layer, where its pivot rows go. padding: the left
    padding [B] of each row, so that places are those of real tokens. computed: the model is given the pivot's tokens
    too, and its own rows of them are replaced as they are written: the cache begins empty, attention is plain causal.
    Raises PivotError where the PivotKV has another number of layers than the model.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        batch_size: int,
        kv_quantizer: KVQuantizer | None = None,
        pivot: FrontRows | None = None,
        devices: list[torch.device] | None = None,
        padding: Tensor | None = None,
        computed: bool = False,
    ) -> None:
        super().__init__(config=config)
        self._writer = kv_quantizer
        self._padding = padding
        self._replacing = pivot if computed else None
        if pivot is None:
            return
        if devices is None or len(devices) != len(pivot.keys):
            raise PivotError(
                f"the PivotKV has {len(pivot.keys)} layers, the model {len(devices or ())}: it is another model's"
            )
        if computed:
            return
        for layer, (key, value, device) in enumerate(zip(pivot.keys, pivot.values, devices, strict=True)):
            keys, values = (part.to(device).expand(batch_size, *part.shape[-3:]).clone() for part in (key, value))
            super().store(keys, values, layer)

    def store(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> LayerKV:
        """Append rows [B, H, T, D], quantized first where the cell says so; returns all rows of the layer."""
        if self._writer is not None:
            positions = self._positions(self.get_seq_length(layer_idx), key_states)
            key_states, value_states = self._writer.write(key_states, value_states, layer_idx, positions)
        if self._replacing is not None and not self.get_seq_length(layer_idx):
            key_states = _with_front(key_states, self._replacing.keys[layer_idx])
            value_states = _with_front(value_states, self._replacing.values[layer_idx])
        return super().store(key_states, value_states, layer_idx, *args, **kwargs)

    def _positions(self, start: int, states: Tensor) -> Tensor:
        """[B or 1, T]: the places of new tokens among their row's real ones."""
        columns = torch.arange(start, start + states.shape[2], device=states.device)
        padding = self._padding if self._padding is not None else torch.zeros(1, dtype=torch.long)
        return columns[None, :] - padding.to(states.device)[:, None]


def _with_front(states: Tensor, front: Tensor) -> Tensor:
    """States [B, H, T, D] with `front` [H, P, D] in the place of their first rows."""
    rows = front.to(states.device).expand(len(states), *front.shape)
    return torch.cat([rows, states[:, :, front.shape[1] :]], dim=2)
