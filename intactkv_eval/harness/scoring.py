"""Log-likelihood of continuations behind a pivot: equal inputs computed once, longest first, right-padded batches.

A request is a body's context and a continuation, in tokens. The logits that predict token j of a row stand at j - 1;
those that predict a row's first token are the pivot's own last ones.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import isnan
from typing import NamedTuple

import torch
from torch import Tensor

from intactkv_eval.errors import PivotError
from intactkv_eval.harness.pivoted import PivotedModel


class Request(NamedTuple):
    """Tokens behind the pivot: `context` may be empty, `continuation` may not."""

    context: list[int]
    continuation: list[int]


class Score(NamedTuple):
    """The continuation's log-likelihood in nats, and whether greedy decoding gives exactly it."""

    log_likelihood: float
    is_greedy: bool


def score(
    pivoted: PivotedModel,
    requests: Sequence[Request],
    rows_for: Callable[[int], int],
    dtype: torch.dtype = torch.float32,
    done: Callable[[int, Score], None] = lambda index, score: None,
) -> list[Score]:
    """Score every request; `rows_for` tells how many rows of so many tokens make a batch.

    `done(index, score)` is called as soon as a score is known. log-softmax is taken in `dtype`.
    Raises PivotError where a log-likelihood is NaN: an answer made from it would look like any other.
    """
    same_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, request in enumerate(requests):
        same_input[tuple((request.context + request.continuation)[:-1])].append(index)
    scores: dict[int, Score] = {}
    for batch in _batches(sorted(same_input, key=len, reverse=True), rows_for):
        logits = _batch_logits(pivoted, batch)
        for row, body in enumerate(batch):
            for index in same_input[body]:
                scores[index] = _score_one(pivoted, requests[index], logits[row], dtype)
                done(index, scores[index])
    return [scores[index] for index in range(len(requests))]


def _batches(bodies: list[tuple[int, ...]], rows_for: Callable[[int], int]) -> Iterator[list[tuple[int, ...]]]:
    start = 0
    while start < len(bodies):
        size = rows_for(len(bodies[start]))
        yield bodies[start : start + size]
        start += size


def _batch_logits(pivoted: PivotedModel, bodies: list[tuple[int, ...]]) -> Tensor:
    """[B, T, V]; T is the longest body's length, 0 where all are empty."""
    longest = max(len(body) for body in bodies)
    if not longest:
        return pivoted.pivot_logits.new_empty(len(bodies), 0, pivoted.pivot_logits.shape[-1])
    padded = torch.zeros(len(bodies), longest, dtype=torch.long)
    for row, body in enumerate(bodies):
        padded[row, : len(body)] = torch.tensor(body, dtype=torch.long)
    return pivoted.body_logits(padded)


def _score_one(pivoted: PivotedModel, request: Request, logits: Tensor, dtype: torch.dtype) -> Score:
    """`logits` [T, V] of the row that holds the request's input."""
    first = len(request.context) - 1
    rows = logits[max(first, 0) : first + len(request.continuation)]
    if first < 0:
        rows = torch.cat([pivoted.pivot_logits[-1:].to(rows.device), rows])
    target = torch.tensor(request.continuation, device=rows.device)
    log_probs = torch.log_softmax(rows, dim=-1, dtype=dtype)
    total = float(log_probs.gather(1, target[:, None]).sum())
    if isnan(total):
        raise PivotError(
            "a log-likelihood is NaN: the model's logits overflowed. In fp16 massive activations do that; "
            "use dtype=bfloat16 or float32"
        )
    return Score(total, bool((rows.argmax(dim=-1) == target).all()))
