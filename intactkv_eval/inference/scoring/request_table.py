"""What is asked of each token sequence, and the sums of what was answered.

A request is a context and a continuation; its sequence is all but the last token. The logits at depth d of a sequence
predict its token d + 1, so a request asks at the depths from the context's last token on.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from intactkv_eval.errors import NumericsError
from intactkv_eval.inference.scoring.packed_rows import PackedRow
from intactkv_eval.inference.scoring.prefix_tree import Tokens, Tree, build_tree


class Request(NamedTuple):
    """Tokens behind the pivot: `context` may be empty, `continuation` may not."""

    context: list[int]
    continuation: list[int]


class RequestScore(NamedTuple):
    """The continuation's log-likelihood in nats, and whether greedy decoding gives exactly it."""

    log_likelihood: float
    is_greedy: bool


class RequestedTokens(NamedTuple):
    """Pairs of a column of a row and the token that it should predict, for each the request."""

    columns: NDArray[np.int64]
    targets: NDArray[np.int64]
    requests: NDArray[np.int64]


class ScoreTable:
    """The requests of one call. front: tokens that every sequence begins with."""

    def __init__(self, requests: Iterable[Request], front: tuple[int, ...]) -> None:
        self._targets: list[Tokens] = []
        self._first: list[int] = []  # the depth that each request asks from; -1 is the pivot's own last logits
        places: dict[bytes, int] = {}
        sequences: list[Tokens] = []
        asking: dict[int, list[int]] = defaultdict(list)
        for index, (context, continuation) in enumerate(requests):
            tokens = np.array([*front, *context, *continuation[:-1]], np.int32)
            place = places.setdefault(tokens.tobytes(), len(sequences))
            if place == len(sequences):
                sequences.append(tokens)
            asking[place].append(index)
            self._targets.append(np.array(continuation, np.int32))
            self._first.append(len(front) + len(context) - 1)
        places.clear()
        self.tree: Tree = build_tree(sequences)
        self._asking = [asking[place] for place in self.tree.order]
        self._needed_from = np.array([min(self._first[index] for index in part) for part in self._asking], np.int64)
        self._left = np.array([len(part) for part in self._targets], np.int64)
        self._total = np.zeros(len(self._targets))
        self._greedy = np.ones(len(self._targets), np.bool_)

    def __len__(self) -> int:
        return len(self._targets)

    def asked_of(self, row: PackedRow) -> RequestedTokens:
        """What is asked at the columns of a row."""
        found: list[tuple[NDArray[np.int64], ...]] = [(np.empty(0, np.int64),) * 3]
        for node, column, _ in row.spans:
            for place in np.flatnonzero(self._needed_from[node.first : node.last] < node.end):
                for index in self._asking[node.first + int(place)]:
                    first = self._first[index]
                    start, stop = max(node.start, first), min(node.end, first + len(self._targets[index]))
                    if start < stop:
                        columns = np.arange(start, stop, dtype=np.int64) + (column - node.start)
                        targets = self._targets[index][start - first : stop - first].astype(np.int64)
                        found.append((columns, targets, np.full(stop - start, index, np.int64)))
        return RequestedTokens(*(np.concatenate(part) for part in zip(*found, strict=True)))

    def asked_of_pivot(self) -> RequestedTokens:
        """What is asked of the pivot's own last logits (column 0)."""
        requests = np.array([index for index, first in enumerate(self._first) if first < 0], np.int64)
        targets = np.array([self._targets[index][0] for index in requests], np.int64)
        return RequestedTokens(np.zeros(len(requests), np.int64), targets, requests)

    def answer(self, requests: NDArray[np.int64], found: NDArray[np.float64], greedy: NDArray[np.bool_]) -> list[int]:
        """Add log-probabilities of single tokens; returns the requests that are complete with them.

        Raises NumericsError where a log-likelihood is not finite: an answer made from it would look like any other.
        """
        np.add.at(self._total, requests, found)
        np.logical_and.at(self._greedy, requests, greedy)
        np.subtract.at(self._left, requests, 1)
        touched = np.unique(requests)
        if not np.isfinite(self._total[touched]).all():
            raise NumericsError("a log-likelihood is NaN or infinite")
        return [int(index) for index in touched[self._left[touched] == 0]]

    def score(self, index: int) -> RequestScore:
        """The answer to a request that is complete."""
        assert self._left[index] == 0
        return RequestScore(float(self._total[index]), bool(self._greedy[index]))
