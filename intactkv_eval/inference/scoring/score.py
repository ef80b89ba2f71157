"""Log-likelihoods through the tree of prefixes: each shared token computed once, logits only where they are asked for.

The pivot is the root. Rows behind one prefix are computed together, as many tokens at once as a batch may hold; a batch
that does not fit in memory is halved, and nothing that was answered is lost.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor

from intactkv_eval.compat.rope_length import forget_long_texts
from intactkv_eval.errors import ConfigError, NumericsError
from intactkv_eval.inference.scoring.lm_head import log_probabilities
from intactkv_eval.inference.scoring.packed_rows import PackedRow, flatten
from intactkv_eval.inference.scoring.prefix_sharing import Prefix, SharedModel, Sharing
from intactkv_eval.inference.scoring.prefix_tree import Limits, Node, all_behind_nothing, behind, merged
from intactkv_eval.inference.scoring.request_table import Request, RequestedTokens, RequestScore, ScoreTable
from intactkv_eval.model.hooks import where_not_finite

logger = logging.getLogger(__name__)

CAPACITY = 192  # tokens of a row of many branches: more of them share less, and every one pays for masked columns
FAR, NEAR_CAPACITY = 256, 96  # behind a prefix of FAR tokens every masked column is dear: rows are shorter
OVERHEAD = 64  # tokens that a forward of its own costs beside its work
PREFIX_BUDGET = 2**30  # bytes of KV held in prefixes
SMALLEST_BATCH = 512  # tokens that any batch may hold
LARGEST_ON_CPU = 1024  # tokens of a batch on a CPU, unless one sequence is longer: more only take more memory


@dataclass
class Counts:
    """How far prefixes were shared, tokens that the model computed, and batches that did not fit in memory."""

    sharing: str | None = None
    tokens: int = 0
    halved: int = 0


def score(
    shared: SharedModel,
    requests: Iterable[Request],
    rows_for: Callable[[int], int],
    dtype: torch.dtype = torch.float32,
    done: Callable[[int, RequestScore], None] = lambda index, score: None,
    share: bool = True,
    counts: Counts | None = None,
) -> list[RequestScore]:
    """Score every request; `rows_for` tells how many whole sequences of so many tokens would make a batch.

    `done(index, score)` is called as soon as a score is known. log-softmax is taken in `dtype`. share: False computes
    every sequence whole. Sequences beyond the border of the model's RoPE frequencies are computed first, each whole, in
    the order in which lm_eval's `hf` computes them. Raises NumericsError where a log-likelihood is NaN, PivotError
    where the pivot cannot stand in front of one, ConfigError where one does not fit in memory.
    """
    asked = list(requests)
    scores: dict[int, RequestScore] = {}
    for part, places, sharing in _by_frequencies(shared, asked, share):

        def answered(index: int, found: RequestScore, places: list[int] = places) -> None:
            scores[places[index]] = found
            done(places[index], found)

        table = ScoreTable([asked[place] for place in places], part.front)
        _Scorer(part, table, rows_for, dtype, answered, counts or Counts()).run(sharing)
    return [scores[place] for place in range(len(asked))]


def _by_frequencies(
    shared: SharedModel, requests: list[Request], share: bool
) -> Iterator[tuple[SharedModel, list[int], Sharing]]:
    """The requests by number: those beyond the border of the RoPE frequencies, then those up to it, and how each share.

    What was kept of a short text is wrong in front of a long one, so beyond the border nothing is shared. A text as
    long as the border is taken with the longer ones where frequencies grow: it has those of the text before it.
    """
    front, rope = len(shared.pivoted.token_ids), shared.pivoted.rope
    lengths = [front + len(context) + len(continuation) - 1 for context, continuation in requests]
    beyond = [place for place, length in enumerate(lengths) if rope.is_beyond(length + rope.grows)]
    if beyond:
        longer = {lengths[place] for place in beyond if rope.is_beyond(lengths[place])}
        if rope.grows and len(longer) > 1:
            logger.warning(
                "requests of up to %d tokens: beyond %d this model's RoPE frequencies grow with the length. "
                "transformers keeps those of the longest text before, so these figures depend on the longest request, "
                "as they do with --model hf --batch_size 1", max(longer), rope.border,
            )  # fmt: skip
        yield shared.for_length(max(lengths)), beyond, Sharing.NOTHING
    short = sorted(set(range(len(requests))) - set(beyond))
    if short:
        if beyond and rope.grows:
            forget_long_texts(shared.pivoted.model)
        yield shared, short, shared.sharing if share else Sharing.NOTHING


class _Scorer:
    def __init__(
        self,
        shared: SharedModel,
        table: ScoreTable,
        rows_for: Callable[[int], int],
        dtype: torch.dtype,
        done: Callable[[int, RequestScore], None],
        counts: Counts,
    ) -> None:
        self.shared, self.table, self.rows_for, self.dtype = shared, table, rows_for, dtype
        self.done, self.counts = done, counts
        self.most: int | None = None  # tokens of a batch, once memory has shown a limit

    def run(self, sharing: Sharing) -> None:
        """Answer everything that the table asks."""
        self.counts.sharing = sharing.name.lower()
        asked = self.table.asked_of_pivot()
        if len(asked.requests):
            self._answer(asked, [self.shared.pivoted.pivot_logits[-1:]], torch.zeros(1, dtype=torch.long))
        if sharing is Sharing.NOTHING:
            self.limits = Limits(0, math.inf, 0)
        else:
            capacity = CAPACITY if sharing is Sharing.TREES else 0
            self.limits = Limits(capacity, OVERHEAD, PREFIX_BUDGET / self.shared.bytes_per_token)
        found = all_behind_nothing(self.table.tree, self.limits)
        self._visit(self.shared.root, found.rows, found.kept, 0)

    def _visit(self, prefix: Prefix, rows: list[Node], kept: list[Node], held: int) -> None:
        """Everything behind a prefix; what it keeps is let go before its next branch."""
        packed = [row for row in rows if row.children]
        bins = merged(packed, self._limits_behind(prefix.length).capacity) + [
            [row] for row in rows if not row.children and row.size
        ]
        flat = [(part, flatten(part, self.table.tree.sequences)) for part in bins]
        for chains in (False, True):
            self._batches(prefix, [(part, row) for part, row in flat if row.is_chain is chains])
        for node in kept:
            alone = replace(node, children=[], below=0)
            row = flatten([alone], self.table.tree.sequences)
            try:
                longer = Prefix(self._compute(prefix, [row], keep=True), self.shared.root.length + node.end)
            except (RuntimeError, MemoryError) as error:
                _memory_ran_out(error)
                self.counts.halved += 1
                whole = Node(node.start, node.start, node.first, node.last, children=[node])
                self._visit(prefix, behind(whole, replace(self.limits, overhead=math.inf), held).rows, [], held)
                continue
            found = behind(node, self._limits_behind(node.end), held + node.end)
            self._visit(longer, found.rows, found.kept, held + node.end)
            del longer

    def _limits_behind(self, length: int) -> Limits:
        if length < FAR:
            return self.limits
        return replace(self.limits, capacity=min(self.limits.capacity, NEAR_CAPACITY))

    def _batches(self, prefix: Prefix, rows: list[tuple[list[Node], PackedRow]]) -> None:
        waiting = sorted(rows, key=lambda pair: len(pair[1].tokens))
        while waiting:
            longest = len(waiting[-1][1].tokens)
            count = max(1, self._tokens(longest) // longest)
            batch, waiting = waiting[-count:][::-1], waiting[:-count]
            try:
                self._compute(prefix, [row for _, row in batch])
                continue
            except (RuntimeError, MemoryError) as error:
                cause = _memory_ran_out(error)
            self.counts.halved += 1
            waiting = sorted(waiting + self._smaller(batch, cause), key=lambda pair: len(pair[1].tokens))

    def _tokens(self, longest: int) -> int:
        most = max(self.rows_for(longest) * longest, SMALLEST_BATCH)
        if self.shared.pivoted.device.type == "cpu":
            most = min(most, max(longest, LARGEST_ON_CPU))
        return most if self.most is None else min(most, self.most)

    def _smaller(self, batch: list[tuple[list[Node], PackedRow]], cause: str) -> list[tuple[list[Node], PackedRow]]:
        """The same rows, to be computed in batches of half as many tokens."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = len(batch) * len(batch[0][1].tokens)
        self.most = tokens // 2
        if len(batch) > 1:
            return batch
        nodes, row = batch[0]
        if len(nodes) == 1:
            nodes = _branches(nodes[0])
        if len(nodes) == 1:
            raise ConfigError(
                f"one sequence of {len(row.tokens)} tokens does not fit in memory: {cause[:200]}; lower max_length or "
                "load the model in fewer bits"
            )
        half = len(nodes) // 2
        return [(part, flatten(part, self.table.tree.sequences)) for part in (nodes[:half], nodes[half:])]

    def _compute(self, prefix: Prefix, rows: Sequence[PackedRow], keep: bool = False) -> list[tuple[Tensor, Tensor]]:
        """Answer what is asked of the rows; returns the KV of prefix and rows where it is to be kept."""
        columns, lead = max(len(row.tokens) for row in rows), 0
        plain = prefix.is_root and not keep and all(row.is_chain for row in rows)
        if plain:
            lead = self.shared.pivoted.lead(columns)
        parts = [self.table.asked_of(row) for row in rows]
        asked = RequestedTokens(
            np.concatenate([part.columns + lead + place * (lead + columns) for place, part in enumerate(parts)]),
            np.concatenate([part.targets for part in parts]),
            np.concatenate([part.requests for part in parts]),
        )
        kept: list[tuple[Tensor, Tensor]] = []

        def forward() -> object:
            if plain:
                return self.shared.plain_forward(rows)
            output, found = self.shared.forward(prefix, rows, keep)
            kept.extend(found)
            return output

        places = torch.from_numpy(np.unique(asked.columns))
        with torch.no_grad():
            try:
                self._answer(asked, self.shared.head.logits(forward, places), places)
            except NumericsError as error:
                raise NumericsError(f"{error}: {where_not_finite(self.shared.pivoted.model, forward)}") from None
        self.counts.tokens += sum(lead + len(row.tokens) for row in rows)
        return kept

    def _answer(self, asked: RequestedTokens, logits: Iterable[Tensor], places: Tensor) -> None:
        """`logits` in slices [n, V] of the sorted places."""
        of_place = np.searchsorted(places.numpy(), asked.columns)
        found = np.empty(len(of_place))
        greedy = np.empty(len(of_place), np.bool_)
        start = 0
        for part in logits:
            inside = np.flatnonzero((of_place >= start) & (of_place < start + len(part)))
            pairs = torch.from_numpy(of_place[inside] - start), torch.from_numpy(asked.targets[inside])
            one, other = log_probabilities(part, *pairs, self.dtype)
            found[inside], greedy[inside] = one.double().cpu().numpy(), other.cpu().numpy()
            start += len(part)
        for index in self.table.answer(asked.requests, found, greedy):
            self.done(index, self.table.score(index))


def _memory_ran_out(error: RuntimeError | MemoryError) -> str:
    """What the error says, if it tells of memory that ran out; any other is raised again."""
    if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
        raise error
    return str(error)


def _branches(node: Node) -> list[Node]:
    """The same questions as smaller subtrees, each with the node's own tokens in front; a chain as it is."""
    if len(node.children) == 1 and not node.ends:
        return _branches(replace(node.children[0], start=node.start))
    if not node.children:
        return [node]
    alone = (
        [Node(node.start, node.end, node.first, node.first + 1, True)] if node.ends and node.end > node.start else []
    )
    return alone + [replace(child, start=node.start) for child in node.children]
