"""Caches of schemes that quantize in groups and leave recent tokens alone: one forward, or step by step.

Behind `exempt` columns groups of G tokens are counted. A query at body place t sees rows below

    boundary(t) = max(0, floor(t / G) * G - R)

quantized, the rest in full, however the tokens arrive: a log-likelihood is what decoding token by token would give.
All rows are kept in every layer, also where a window slides: a group's range needs all of its rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intactkv_eval.cache.scheme import Scheme
from intactkv_eval.cache.writer import LayerKV
from intactkv_eval.compat.cache_use import CountingCache
from intactkv_eval.compat.transformers_api import DynamicLayer


@dataclass(frozen=True)
class Groups:
    """Where groups of `size` columns lie behind `exempt` ones, and when they are quantized."""

    exempt: int
    size: int
    recent: int

    def boundary(self, column: int) -> int:
        """The column below which a query at `column` sees quantized rows (but the exempt ones)."""
        body = max(column - self.exempt, 0)
        return self.exempt + max(0, body // self.size * self.size - self.recent)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Columns [start, stop) in pieces whose queries all have the same boundary."""
        while start < stop:
            edge = self.exempt + (max(start - self.exempt, self.recent) // self.size + 1) * self.size
            yield start, min(edge, stop)
            start = edge

    def mask(self, first: int, total: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """The additive mask [1, 1, T, Q + total] of queries in columns [first, total).

        Keys are the Q quantized copies of columns [exempt, boundary(total - 1)), then all columns in full. With a
        window a query sees only that many columns, itself among them.
        """
        columns = torch.arange(total)
        queries = columns[first:, None]
        ages = (queries - self.exempt).clamp(min=0) // self.size * self.size - self.recent
        edges = self.exempt + ages.clamp(min=0)
        copies = torch.arange(self.exempt, self.boundary(total - 1))
        in_full = (columns <= queries) & ((columns < self.exempt) | (columns >= edges))
        seen = torch.cat([copies < edges, in_full], dim=1)
        if window is not None:
            seen &= queries - torch.cat([copies, columns]) < window
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


class _GroupCache(CountingCache):
    """front: keys and values [H, P, D] of each layer, possibly none."""

    def __init__(self, front: Sequence[LayerKV], batch_size: int, scheme: Scheme, groups: Groups) -> None:
        super().__init__()
        self._scheme, self._groups = scheme, groups
        for pair in front:
            layer = DynamicLayer()
            layer.lazy_initialization(*pair)
            layer.keys, layer.values = (part.expand(batch_size, -1, -1, -1) for part in pair)
            self.layers.append(layer)

    def _quantized(self, keys: Tensor, values: Tensor, layer: int, start: int, stop: int) -> LayerKV:
        """Whole groups in columns [start, stop) of full rows."""
        positions = torch.arange(start, stop, device=keys.device)[None]
        keys, values = keys[:, :, start:stop], values[:, :, start:stop]
        return self._scheme.keys(keys, layer, positions), self._scheme.values(values, layer, positions)


class SideBySideCache(_GroupCache):
    """For one forward: returns [quantized copies | full rows], of which `Groups.mask` shows each query the right ones.

    Right-padded rows need nothing else: no token sees a group that is not whole before it.
    """

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Rows [B, H, T, D] -> keys and values [B, H, Q + P + T, D]; nothing is kept."""
        keys, values = key_states, value_states
        if layer_idx < len(self.layers):
            layer = self.layers[layer_idx]
            keys, values = torch.cat([layer.keys, keys], dim=2), torch.cat([layer.values, values], dim=2)
        exempt, edge = self._groups.exempt, self._groups.boundary(keys.shape[2] - 1)
        if edge == exempt:
            return keys, values
        fake = self._quantized(keys, values, layer_idx, exempt, edge)
        return torch.cat([fake[0], keys], dim=2), torch.cat([fake[1], values], dim=2)


class StreamCache(_GroupCache):
    """For decoding rows without padding: a group is quantized, once, when it is older than the recent tokens.

    The tokens of one update must have the same boundary: see `Groups.chunks`.
    """

    def __init__(self, front: Sequence[LayerKV], batch_size: int, scheme: Scheme, groups: Groups) -> None:
        super().__init__(front, batch_size, scheme, groups)
        self._done: dict[int, int] = {}  # of each layer, the column below which rows are quantized

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        """Append rows [B, H, T, D]; returns all rows of the layer as these tokens see them."""
        start = self.get_seq_length(layer_idx)
        last = start + key_states.shape[2] - 1
        edge = self._groups.boundary(start)
        assert edge == self._groups.boundary(last), f"columns {start} to {last} do not see the same rows quantized"
        done = self._done.get(layer_idx, self._groups.exempt)
        if edge > done:
            self._done[layer_idx] = edge
            layer = self.layers[layer_idx]
            fake = self._quantized(layer.keys, layer.values, layer_idx, done, edge)
            layer.keys, layer.values = (
                torch.cat([old[:, :, :done], new, old[:, :, edge:]], dim=2)
                for old, new in zip((layer.keys, layer.values), fake, strict=True)
            )
        return super().store(key_states, value_states, layer_idx, *args, **kwargs)
