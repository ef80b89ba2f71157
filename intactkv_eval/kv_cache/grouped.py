"""Caches of schemes that quantize in groups and leave recent tokens alone (KIVI's): many tokens at once, or one by one.

Behind `exempt` columns tokens are counted. With a residual length R a query at body place t sees

    keys    below floor(t / R) * R quantized: R at a time, so that the newest t mod R are in full
    values  below max(0, t - R) quantized: the newest R are in full

and itself in full, however the tokens arrive: a log-likelihood is what decoding token by token would give. These are
the rows that KIVI's released code has at each step of decoding (there, tokens of one prompt see each other in full).
All rows are kept in every layer, also where a window slides: a group's range needs all of its rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.compat.cache_use import CountingCache
from intactkv_eval.compat.transformers_api import DynamicLayer
from intactkv_eval.kv_quant.quantizer import LayerKV
from intactkv_eval.kv_quant.scheme import KVScheme


@dataclass(frozen=True)
class TokenGroups:
    """Which rows behind `exempt` columns are quantized, and for which query. residual: R, more than 0."""

    exempt: int
    residual: int

    def boundaries(self, column: int) -> tuple[int, int]:
        """The columns below which a query at `column` sees quantized keys, and quantized values (but the exempt ones).

        That of the keys is never the smaller one.
        """
        body = max(column - self.exempt, 0)
        return self.exempt + body // self.residual * self.residual, self.exempt + max(0, body - self.residual)

    def copies(self, first: int, total: int) -> tuple[slice, slice, slice]:
        """The columns that queries in [first, total) need: quantized, with quantized keys and full values, and in full.

        The exempt columns, always in full, come in front of the last.
        """
        keys_from, values_from = self.boundaries(first)
        keys_to, values_to = self.boundaries(total - 1)
        return slice(self.exempt, values_to), slice(values_from, keys_to), slice(keys_from, max(total, keys_from))

    def mask(self, first: int, total: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask [1, 1, T, Q] of queries in columns [first, total), over all `copies` side by side.

        With a window a query sees only that many columns, itself among them.
        """
        quantized, mixed, full = (torch.arange(part.start, part.stop) for part in self.copies(first, total))
        full = torch.cat([torch.arange(min(self.exempt, total)), full])
        queries = torch.arange(first, total)[:, None]
        edges = torch.tensor([self.boundaries(column) for column in range(first, total)])
        keys_to, values_to = edges[:, :1], edges[:, 1:]
        seen = torch.cat(
            [
                quantized < values_to,
                (mixed >= values_to) & (mixed < keys_to),
                (full <= queries) & ((full < self.exempt) | (full >= keys_to)),
            ],
            dim=1,
        )
        if window is not None:
            seen &= queries - torch.cat([quantized, mixed, full]) < window
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


class _GroupCache(CountingCache):
    """front: keys and values [H, P, D] or [B, H, P, D] of each layer, possibly none."""

    def __init__(self, front: Sequence[LayerKV], batch_size: int, scheme: KVScheme, groups: TokenGroups) -> None:
        super().__init__()
        self._scheme, self._groups = scheme, groups
        for pair in front:
            layer = DynamicLayer()
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = (part.expand(batch_size, -1, -1, -1) for part in pair)
            self.layers.append(layer)

    def _keys(self, keys: Tensor, layer: int, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of full keys, whole groups of them, quantized."""
        return self._scheme.keys(keys[:, :, start:stop], layer, _positions(start, stop, keys))

    def _values(self, values: Tensor, layer: int, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of full values, quantized."""
        return self._scheme.values(values[:, :, start:stop], layer, _positions(start, stop, values))


def _positions(start: int, stop: int, states: Tensor) -> Tensor:
    return torch.arange(start, stop, device=states.device)[None]


class SideBySideCache(_GroupCache):
    """For many tokens at once: returns all copies of rows, of which `TokenGroups.mask` shows each query the right ones.

    Right-padded rows need nothing else: no token sees a group that is not whole before it.
    keep: whether rows are held in full, for the next tokens and for `rows`.
    """

    def __init__(
        self, front: Sequence[LayerKV], batch_size: int, scheme: KVScheme, groups: TokenGroups, keep: bool = False
    ) -> None:
        super().__init__(front, batch_size, scheme, groups)
        self._keep = keep

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Rows [B, H, T, D] behind those that are held -> keys and values [B, H, Q, D]."""
        first = self.get_seq_length(layer_idx)
        keys, values = key_states, value_states
        if self._keep:
            keys, values = super().store(key_states, value_states, layer_idx, *args, **kwargs)
        elif first:
            layer = self.layers[layer_idx]
            keys, values = torch.cat([layer.keys, keys], dim=2), torch.cat([layer.values, values], dim=2)
        exempt = self._groups.exempt
        quantized, mixed, full = self._groups.copies(first, keys.shape[2])
        if mixed.stop == exempt:
            return keys, values
        fake_keys = self._keys(keys, layer_idx, exempt, mixed.stop)
        of_mixed = slice(mixed.start - exempt, mixed.stop - exempt)
        fake_values = self._values(values, layer_idx, quantized.start, quantized.stop)
        fakes = [fake_keys[:, :, : fake_values.shape[2]], fake_keys[:, :, of_mixed]]
        return (
            torch.cat([*fakes, keys[:, :, :exempt], keys[:, :, full]], dim=2),
            torch.cat([fake_values, values[:, :, mixed], values[:, :, :exempt], values[:, :, full]], dim=2),
        )

    def rows(self) -> list[LayerKV]:
        """Keys and values [B, H, S, D] of each layer in full, the front among them, where rows are kept."""
        return [(layer.keys, layer.values) for layer in self.layers]


class StreamCache(_GroupCache):
    """For decoding rows without padding: a key or value is quantized, once, when it is old enough.

    front: full rows, the computed ones of a prompt among them. The tokens of one update must have the same boundaries.
    """

    def __init__(self, front: Sequence[LayerKV], batch_size: int, scheme: KVScheme, groups: TokenGroups) -> None:
        super().__init__(front, batch_size, scheme, groups)
        self._done: dict[int, tuple[int, int]] = {}  # of each layer, the columns below which rows are quantized
        for layer in self.layers:  # rows are quantized in place
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Append rows [B, H, T, D]; returns all rows of the layer as these tokens see them."""
        start = self.get_seq_length(layer_idx)
        last = start + key_states.shape[2] - 1
        edges = self._groups.boundaries(start)
        assert edges == self._groups.boundaries(last), f"columns {start} to {last} do not see the same rows quantized"
        done = self._done.get(layer_idx, (self._groups.exempt, self._groups.exempt))
        self._done[layer_idx] = edges
        if edges[0] > done[0]:
            layer = self.layers[layer_idx]
            layer.keys[:, :, done[0] : edges[0]] = self._keys(layer.keys, layer_idx, done[0], edges[0])
        if edges[1] > done[1]:
            layer = self.layers[layer_idx]
            layer.values[:, :, done[1] : edges[1]] = self._values(layer.values, layer_idx, done[1], edges[1])
        return super().store(key_states, value_states, layer_idx, *args, **kwargs)
