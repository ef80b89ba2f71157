"""The start that generation requests have in common (a chat head, few-shot examples), computed once and kept.

Kept is one start at a time: that of the last requests. Knows tokens and tensors; not what they mean.
"""

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
from torch import Tensor

from intactkv_eval.harness.prefix_tree import Node
from intactkv_eval.harness.shared import SharedModel, Sharing
from intactkv_eval.harness.tree_rows import flatten

WORTH = 16  # tokens that a kept start must save


@dataclass(frozen=True, eq=False)
class Start:
    """tokens: of the bodies' common start. keys, values: [H, P + tokens, D] of each layer, the pivot's in front."""

    tokens: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class SharedStart:
    """Finds and keeps the start that requests share."""

    def __init__(self, shared: SharedModel) -> None:
        self.shared = shared
        self.computed = 0
        self._held: Start | None = None
        self._previous: list[int] | None = None

    def of(self, bodies: list[list[int]]) -> Start | None:
        """The kept start of all `bodies`, each longer than it; None where there is none that is worth it."""
        start = _common([*bodies, self._previous] if self._previous else bodies)
        self._previous = bodies[0]
        most = min(len(body) for body in bodies) - 1
        if self._held and self._fits(self._held.tokens, bodies) and len(self._held.tokens) > len(start) - WORTH:
            return self._held
        start = start[:most]
        if len(start) < WORTH or not self._allowed():
            return None
        self._held = self._compute(start)
        return self._held

    @staticmethod
    def _fits(tokens: tuple[int, ...], bodies: list[list[int]]) -> bool:
        length = len(tokens)
        return all(len(body) > length and tuple(body[:length]) == tokens for body in bodies)

    def _allowed(self) -> bool:
        """Sliding windows count columns: padding between a kept start and a body would push it out too early."""
        return self.shared.pivoted.window is None and self.shared.sharing is not Sharing.NOTHING

    def _compute(self, start: list[int]) -> Start:
        tokens = np.array([*self.shared.front, *start], np.int32)
        row = flatten([Node(0, len(tokens), 0, 1)], [tokens])
        _, rows = self.shared.forward(self.shared.root, [row], keep=True)
        self.computed += 1
        return Start(tuple(start), tuple(keys[0] for keys, _ in rows), tuple(values[0] for _, values in rows))


def _common(bodies: list[list[int]]) -> list[int]:
    return [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*bodies, strict=False))]
