"""What is computed already in front of generation requests: kept turns, or the start that they have in common.

Kept is one start at a time (a chat head, few-shot examples): that of the last requests. Knows tokens and tensors; not
what they mean.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile

import numpy as np

from intactkv_eval.inference.generation.turn_cache import BUDGET, ConversationKVCache, PrefixKV
from intactkv_eval.inference.scoring.packed_rows import flatten
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel, Sharing
from intactkv_eval.inference.scoring.prefix_tree import Node

WORTH = 16  # tokens that a kept start must save


class PrefixCache:
    """Finds and keeps the start that requests share."""

    def __init__(self, shared: SharedModel) -> None:
        self.shared = shared
        self.computed = 0
        self.turns: ConversationKVCache | None = None
        self._held: PrefixKV | None = None
        self._previous: list[int] | None = None

    @contextmanager
    def turns_kept(self, budget: int = BUDGET, columns: int = 1) -> Iterator[None]:
        """While it lasts, what is generated is held for requests that go on from it, where the model allows it.

        budget: the most bytes of KV that are held. columns: of the longest row, most of whose padding is behind it.
        """
        allowed = self._allowed() and not self.shared.pivoted.columns.counted(columns)
        self.turns = ConversationKVCache(len(self.shared.pivoted.token_ids), budget) if allowed else None
        try:
            yield
        finally:
            self.turns = None

    def of(self, bodies: list[list[int]]) -> PrefixKV | None:
        """What is kept in front of `bodies`, each longer than it; None where there is nothing that is worth it."""
        found = self.turns.of(bodies, WORTH) if self.turns is not None else None
        return found or self._common(bodies)

    def _common(self, bodies: list[list[int]]) -> PrefixKV | None:
        start = _agreeing([*bodies, self._previous] if self._previous else bodies)
        self._previous = bodies[0]
        most = min(len(body) for body in bodies) - 1
        if self._held and self._fits(self._held.tokens[0], bodies) and len(self._held.tokens[0]) > len(start) - WORTH:
            return self._for(len(bodies))
        start = start[:most]
        if len(start) < WORTH or not self._allowed():
            return None
        self._held = self._compute(start)
        return self._for(len(bodies))

    def _for(self, rows: int) -> PrefixKV:
        assert self._held is not None
        return replace(self._held, tokens=self._held.tokens * rows)

    @staticmethod
    def _fits(tokens: tuple[int, ...], bodies: list[list[int]]) -> bool:
        length = len(tokens)
        return all(len(body) > length and tuple(body[:length]) == tokens for body in bodies)

    def _allowed(self) -> bool:
        """Sliding windows count columns: padding between a kept start and a body would push it out too early."""
        return self.shared.pivoted.window is None and self.shared.sharing is not Sharing.NOTHING

    def _compute(self, start: list[int]) -> PrefixKV:
        tokens = np.array([*self.shared.front, *start], np.int32)
        row = flatten([Node(0, len(tokens), 0, 1)], [tokens])
        _, rows = self.shared.forward(self.shared.root, [row], keep=True)
        self.computed += 1
        return PrefixKV([tuple(start)], tuple(keys[0] for keys, _ in rows), tuple(values[0] for _, values in rows))


def _agreeing(bodies: list[list[int]]) -> list[int]:
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*bodies, strict=False))]
