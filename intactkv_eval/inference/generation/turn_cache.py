"""The KV of what was generated, held for requests that go on from it: a second turn does not compute the first again.

Rows are found by their tokens, so a text that is tokenized otherwise when it comes back is used as far as it agrees.
Knows tokens and tensors; not what they mean.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intactkv_eval.kv_cache.pivot_cache import PivotCache

BUDGET = 2**30  # bytes of KV


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """What stands in front of each row of a batch: tokens behind the pivot, none where nothing fits.

    keys, values: of each layer [H, P + S, D] where the rows have one front, else [B, H, P + S, D], left-padded.
    """

    tokens: list[tuple[int, ...]]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def repeated(self, times: int) -> "PrefixKV":
        """The same with each row of a batch so many times, for beams."""
        if times == 1 or self.keys[0].ndim == 3:
            return self
        parts = (tuple(part.repeat_interleave(times, 0) for part in kind) for kind in (self.keys, self.values))
        return PrefixKV([tokens for tokens in self.tokens for _ in range(times)], *parts)


@dataclass(frozen=True, eq=False)
class _Held:
    tokens: NDArray[np.int32]  # [S], behind the pivot
    rows: list[tuple[Tensor, Tensor]]  # of each layer [H, P + S, D]

    @property
    def size(self) -> int:
        return sum(part.numel() * part.element_size() for layer in self.rows for part in layer)


class ConversationKVCache:
    """Rows that were generated behind `pivot` tokens, the least recent let go where they exceed `budget` bytes."""

    def __init__(self, pivot: int, budget: int = BUDGET) -> None:
        self.pivot, self.budget = pivot, budget
        self._held: OrderedDict[bytes, _Held] = OrderedDict()

    def hold(self, ids: Tensor, mask: Tensor, cache: PivotCache) -> None:
        """Hold every row of `ids` [B, T] (1 in `mask` where a token is) as far as `cache` has computed it."""
        length = cache.get_seq_length()
        layers = [(layer.keys, layer.values) for layer in cache.layers]
        for row, (tokens, seen) in enumerate(zip(ids[:, :length], mask[:, :length], strict=True)):
            columns = torch.nonzero(seen)[:, 0]
            body = tokens[columns][self.pivot :].cpu().numpy().astype(np.int32)
            rows = [
                (keys[row][:, columns.to(keys.device)], values[row][:, columns.to(values.device)])
                for keys, values in layers
            ]
            self._add(_Held(body, rows))

    def _add(self, held: _Held) -> None:
        key = held.tokens.tobytes()
        for known in [known for known in self._held if key.startswith(known)]:
            del self._held[known]  # the new row goes on from it
        self._held[key] = held
        while self._held and sum(one.size for one in self._held.values()) > self.budget:
            self._held.popitem(last=False)

    def of(self, bodies: list[list[int]], worth: int) -> PrefixKV | None:
        """The fronts of `bodies`, each shorter than its body; None where none is of at least `worth` tokens."""
        found = [self._longest(np.array(body, np.int32), worth) for body in bodies]
        some = next((held for held, _ in found if held is not None), None)
        if some is None:
            return None
        width = self.pivot + max(length for _, length in found)
        made: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, parts in enumerate(some.rows):
            for part, whole in zip(parts, made, strict=True):
                whole.append(part.new_zeros(len(bodies), part.shape[0], width, part.shape[2]))
            for row, (held, length) in enumerate(found):
                source, taken = (held or some).rows[layer], self.pivot + length
                for part, whole in zip(source, made, strict=True):
                    whole[layer][row, :, width - taken :] = part[:, :taken]
        tokens = [tuple(body[:length]) for body, (_, length) in zip(bodies, found, strict=True)]
        return PrefixKV(tokens, tuple(made[0]), tuple(made[1]))

    def _longest(self, body: NDArray[np.int32], worth: int) -> tuple[_Held | None, int]:
        best: tuple[_Held | None, int] = (None, 0)
        for held in self._held.values():
            most = min(len(held.tokens), len(body) - 1)
            differ = np.flatnonzero(held.tokens[:most] != body[:most])
            length = int(differ[0]) if len(differ) else most
            if length >= max(worth, best[1] + 1):
                best = held, length
        return best
