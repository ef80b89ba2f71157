"""The tree of token sequences, and the order in which its tokens are computed, each once.

    sequences  "a b c", "a b d e", "a x"        tree  a -+- b -+- c
                                                      |     +- d e
                                                      +- x
A subtree of at most `capacity` tokens becomes one row: its tokens lie side by side, each sees its ancestors only. The
shared start of a larger one is either kept (computed once, held while its users run) or, where that saves less than
`overhead` tokens, computed again in every row. Capacity 0 gives rows of single sequences; infinite overhead keeps none.
A pure data structure: knows tokens, no model and no tensor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int32]


@dataclass(slots=True, eq=False)
class Node:
    """Tokens [start, end) of the sorted sequences [first, last), and what stands behind them.

    ends: whether sequence `first` ends here. below: the tokens of all children's subtrees.
    """

    start: int
    end: int
    first: int
    last: int
    ends: bool = False
    children: list["Node"] = field(default_factory=list)
    below: int = 0

    @property
    def size(self) -> int:
        """Tokens of the whole subtree."""
        return self.end - self.start + self.below


@dataclass(frozen=True)
class Tree:
    """sequences: distinct, sorted. order: for each of them its place in what was given. root: the node of all."""

    sequences: list[Tokens]
    order: list[int]
    root: Node


def build_tree(sequences: Sequence[Tokens]) -> Tree:
    """Distinct sequences of non-negative tokens -> their tree."""
    order = sorted(range(len(sequences)), key=lambda place: sequences[place].astype(">i4").tobytes())
    inside = [sequences[place] for place in order]
    shared = np.array([0, *(_common(one, other) for one, other in pairwise(inside))], np.int64)
    root = Node(0, 0, 0, len(inside))
    made, waiting = [root], [root]
    while waiting:
        node = waiting.pop()
        inner = shared[node.first + 1 : node.last]
        node.end = int(inner.min()) if len(inner) else len(inside[node.first])
        node.ends = len(inside[node.first]) == node.end
        cuts = [node.first, *(node.first + 1 + np.flatnonzero(inner == node.end)), node.last]
        ranges = list(pairwise(cuts))[1 if node.ends else 0 :]
        node.children = [Node(node.end, node.end, int(first), int(last)) for first, last in ranges]
        made.extend(node.children)
        waiting.extend(node.children)
    for node in reversed(made):  # children stand behind their parent
        node.below = sum(child.size for child in node.children)
    return Tree(inside, order, root)


def _common(one: Tokens, other: Tokens) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


@dataclass(frozen=True)
class Limits:
    """capacity: tokens of a row. overhead: tokens that keeping a prefix must save. budget: tokens held in prefixes."""

    capacity: int
    overhead: float
    budget: float


@dataclass(frozen=True)
class Behind:
    """What is computed behind one prefix: rows, and the longer prefixes that are kept while their own users run."""

    rows: list[Node]
    kept: list[Node]


def behind(node: Node, limits: Limits, held: int) -> Behind:
    """The rows and the longer prefixes behind a kept node, or behind nothing (a root whose start is not yet computed).

    held: tokens that the kept prefixes hold so far, each counted with all of its own prefix.
    """
    found = Behind([], [])
    waiting = [replace(child) for child in node.children]
    while waiting:
        _place(waiting.pop(), limits, held, found, waiting)
    return found


def all_behind_nothing(tree: Tree, limits: Limits) -> Behind:
    """The first step: rows and kept prefixes of the whole tree."""
    return behind(Node(0, 0, 0, len(tree.sequences), children=[tree.root]), limits, 0)


def _place(node: Node, limits: Limits, held: int, found: Behind, waiting: list[Node]) -> None:
    lead = node.end - node.start
    if not node.children or node.size <= limits.capacity:
        found.rows.append(node)
        return
    branches = len(node.children) + node.ends
    if lead * (branches - 1) >= limits.overhead and held + node.end <= limits.budget:
        found.kept.append(node)
        return
    alone = node.ends
    for group in _groups(node, limits.capacity):
        if len(group) == 1 and lead + group[0].size > limits.capacity:
            waiting.append(replace(group[0], start=node.start))
            continue
        ends = node.ends and group[0] is node.children[0]  # neighbours of the sequence that ends here
        found.rows.append(_grouped(node, node.first if ends else group[0].first, group, ends))
        alone = alone and not ends
    if alone:
        found.rows.append(_grouped(node, node.first, [], True))


def _grouped(node: Node, first: int, group: list[Node], ends: bool) -> Node:
    last = group[-1].last if group else first + 1
    return Node(node.start, node.end, first, last, ends, group, sum(child.size for child in group))


def _groups(node: Node, capacity: int) -> Iterator[list[Node]]:
    """Neighbouring children that make a row together, behind the node's own tokens."""
    group: list[Node] = []
    room = left = capacity - (node.end - node.start)
    for child in node.children:
        if group and child.size > left:
            yield group
            group, left = [], room
        group.append(child)
        left -= child.size
    if group:
        yield group


def merged(rows: Sequence[Node], capacity: int) -> list[list[Node]]:
    """Rows behind one prefix that begin at the same depth, put together up to `capacity` tokens; longest first."""
    bins: list[list[Node]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda node: node.size, reverse=True):
        place = next((place for place in range(max(0, len(bins) - 8), len(bins)) if row.size <= room[place]), None)
        if place is None:
            bins.append([row])
            room.append(capacity - row.size)
        else:
            bins[place].append(row)
            room[place] -= row.size
    return bins
