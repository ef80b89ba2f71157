"""Subtrees side by side in one row: its tokens, their positions, and which of them each may see.

A token sees the whole prefix and its own ancestors. Knows arrays and tensors, no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from intactkv_eval.inference.scoring.prefix_tree import Node, Tokens


@dataclass(frozen=True, eq=False)
class PackedRow:
    """tokens [T] and depths [T], their places in their sequences.

    spans: each node, its first column, and the last column of its parent or -1.
    """

    tokens: Tokens
    depths: Tokens
    spans: list[tuple[Node, int, int]]

    @property
    def is_chain(self) -> bool:
        """Whether the row is one sequence, so that plain causal attention is right."""
        return all(parent == column - 1 for _, column, parent in self.spans)


def flatten(nodes: Sequence[Node], sequences: Sequence[Tokens]) -> PackedRow:
    """Subtrees that start at the same depth, one behind the other."""
    spans: list[tuple[Node, int, int]] = []
    pieces: list[Tokens] = []
    depths: list[Tokens] = []
    column = 0
    waiting = [(node, -1) for node in reversed(nodes)]
    while waiting:
        node, parent = waiting.pop()
        length = node.end - node.start
        if length:
            spans.append((node, column, parent))
            pieces.append(sequences[node.first][node.start : node.end])
            depths.append(np.arange(node.start, node.end, dtype=np.int32))
            column += length
            parent = column - 1
        waiting.extend((child, parent) for child in reversed(node.children))
    return PackedRow(np.concatenate(pieces), np.concatenate(depths), spans)


def visible(row: PackedRow, columns: int) -> NDArray[np.bool_]:
    """[columns, columns]: which column each sees; padding sees itself, so that no softmax is of nothing."""
    seen = np.eye(columns, dtype=np.bool_)
    for node, column, parent in row.spans:
        stop = column + node.end - node.start
        if parent >= 0:
            seen[column:stop] |= seen[parent]
        seen[column:stop, column:stop] = np.tri(stop - column, dtype=np.bool_)
    return seen


def padded(rows: Sequence[PackedRow]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and positions [B, T] (int64)."""
    longest = max(len(row.tokens) for row in rows)
    made = np.zeros((2, len(rows), longest), dtype=np.int64)
    for place, row in enumerate(rows):
        made[0, place, : len(row.tokens)] = row.tokens
        made[1, place, : len(row.tokens)] = row.depths
    ids, positions = torch.from_numpy(made)
    return ids, positions


def mask(rows: Sequence[PackedRow], positions: Tensor, prefix: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """The additive mask [B, 1, T, prefix + T] of rows at `positions` [B, T] behind `prefix` tokens.

    With a window a token sees only that many positions, itself among them.
    """
    columns = positions.shape[1]
    seen = torch.from_numpy(np.stack([visible(row, columns) for row in rows]))
    seen = torch.cat([torch.ones(len(rows), columns, prefix, dtype=torch.bool), seen], dim=2)
    if window is not None:
        keys = torch.cat([torch.arange(prefix).expand(len(rows), -1), positions], dim=1)
        seen &= positions[:, :, None] - keys[:, None, :] < window
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
