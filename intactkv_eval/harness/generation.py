"""Generation behind a pivot: left-padded bodies in, the same bodies with the new tokens behind them out.

    intact:      ids = [pivot | left padding | body], mask = [1 | 0 | 1], cache = the pivot's rows
    not intact:  ids = [left padding | pivot | body], no cache given

Where the KV is quantized in groups, rows have no padding, and the cache holds all but the last token.
Knows tokens; stop strings and decoding of text are lm_eval's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from intactkv_eval.cache.group_cache import StreamCache
from intactkv_eval.cache.pivot_cache import PivotCache
from intactkv_eval.errors import NumericsError, PivotError
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.row_sampler import BrokenLogits, FiniteLogits, RowSampler, warped
from intactkv_eval.harness.shared_start import SharedStart
from intactkv_eval.harness.turns import Front
from intactkv_eval.pivot.watch import where_not_finite

Stopping = Callable[[int, int], StoppingCriteriaList]
"""(columns before the first new token, rows) -> when to stop."""


def generate(
    pivoted: PivotedModel,
    bodies: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stopping: Stopping | None = None,
    starts: SharedStart | None = None,
    sampler: RowSampler | None = None,
    **options: Any,
) -> Tensor:
    """Left-padded `bodies` [B, T] with `mask` [B, T] (1 where a token is) -> [B, T + N], N <= max_new_tokens.

    A row without any token gets its first one from the pivot's own logits. `options` are those of
    `transformers.generate`. Rows that cannot share a batch are generated in several. starts: keeps the KV of a start
    that requests have in common, and of earlier turns. sampler: how each row is sampled, instead of by `options`.
    Raises PivotError for a row without a token where there is no pivot either.
    """
    padding = (mask == 0).sum(dim=1)
    empty = padding == mask.shape[1]
    if empty.any():
        return _from_nothing(pivoted, bodies, mask, empty, max_new_tokens, stopping, sampler, options)
    rows = [row[amount:] for row, amount in zip(bodies.tolist(), padding.tolist(), strict=True)]
    front = starts.of(rows) if starts else None
    in_groups = pivoted.writer is not None and pivoted.writer.in_groups
    if (in_groups and padding.any()) or _padding_counts(pivoted, rows, front, max_new_tokens):
        return _by_length(pivoted, bodies, padding, max_new_tokens, stopping, sampler, options)
    if front is not None or pivoted.pivot is not None:
        ids, mask = _behind_front(rows, pivoted.token_ids, front, bodies)
    else:
        pivot = torch.tensor(pivoted.token_ids, dtype=torch.long, device=bodies.device).expand(len(bodies), -1)
        ids, mask = _behind_padding(pivot, bodies, padding)
    beams = int(options.get("num_beams") or 1)  # transformers repeats the ids of a row for its beams, not a given cache
    turns = starts.turns if starts is not None and beams == 1 else None
    cache: PivotCache | StreamCache | None = None
    if in_groups:
        cache = pivoted.prefilled(ids.repeat_interleave(beams, 0))
    elif front is not None or turns is not None or pivoted.pivot is not None or pivoted.writer is not None:
        empty_columns = (mask == 0).sum(dim=1).repeat_interleave(beams)
        cache = pivoted.new_cache(len(bodies) * beams, empty_columns, *([front.repeated(beams)] if front else []))
    try:
        out = pivoted.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            stopping_criteria=stopping(ids.shape[1], len(ids)) if stopping else None,
            use_cache=True,
            logits_processor=LogitsProcessorList([FiniteLogits(), *([sampler] if sampler else [])]),
            **options,
        )
    except BrokenLogits as error:
        broken = [*rows[error.place // beams], *error.tokens[ids.shape[1] :].tolist()]
        raise NumericsError(f"{error}: {_where(pivoted, broken)}") from None
    if turns is not None and isinstance(cache, PivotCache) and len(out) == len(ids):
        turns.hold(out, torch.nn.functional.pad(mask, (0, out.shape[1] - ids.shape[1]), value=1), cache)
    return torch.cat([bodies, out[:, ids.shape[1] :]], dim=1)


def _where(pivoted: PivotedModel, row: list[int]) -> str:
    """Where a row, alone, has NaN or infinite numbers."""
    with torch.no_grad():
        return where_not_finite(pivoted.model, partial(pivoted.logits, torch.tensor([row], device=pivoted.device)))


def _behind_front(
    rows: list[list[int]], pivot: tuple[int, ...], front: Front | None, bodies: Tensor
) -> tuple[Tensor, Tensor]:
    """[padding | pivot | what is computed already | padding | the rest] of each row, and its mask [B, T].

    Cached rows stand in front of all others, so what is left of a row has its own padding behind them.
    """
    held = front.tokens if front is not None else [()] * len(rows)
    rest = [row[len(tokens) :] for row, tokens in zip(rows, held, strict=True)]
    first, last = max(map(len, held)), max(map(len, rest))
    ids = bodies.new_zeros(len(rows), len(pivot) + first + last)
    mask = torch.zeros_like(ids)
    for place, (tokens, left) in enumerate(zip(held, rest, strict=True)):
        ids[place] = rows[place][0]  # padding that no penalty of seen tokens can tell from the row
        known = torch.tensor([*pivot, *tokens], dtype=ids.dtype)
        for part, end in ((known, len(pivot) + first), (torch.tensor(left, dtype=ids.dtype), ids.shape[1])):
            ids[place, end - len(part) : end] = part.to(ids.device)
            mask[place, end - len(part) : end] = 1
    return ids, mask


def _padding_counts(pivoted: PivotedModel, rows: list[list[int]], front: Front | None, new_tokens: int) -> bool:
    """Whether padding would stand behind kept rows, in a model that counts columns: it would push them away."""
    if front is None and pivoted.pivot is None:
        return False
    held = [len(tokens) for tokens in front.tokens] if front is not None else [0] * len(rows)
    rest = [len(row) - length for row, length in zip(rows, held, strict=True)]
    if len(set(rest)) == 1:
        return False
    return pivoted.columns.counted(len(pivoted.token_ids) + max(held) + max(rest) + new_tokens)


def _by_length(
    pivoted: PivotedModel,
    bodies: Tensor,
    padding: Tensor,
    max_new_tokens: int,
    stopping: Stopping | None,
    sampler: RowSampler | None,
    options: dict[str, Any],
) -> Tensor:
    """Rows of equal length together, behind the pivot alone, so that no row has padding behind it."""
    pad = int(options.get("pad_token_id") or 0)
    out = bodies.new_full((len(bodies), bodies.shape[1] + max_new_tokens), pad)
    out[:, : bodies.shape[1]] = bodies
    for amount in sorted(set(padding.tolist())):
        rows = padding == amount
        part = bodies[rows][:, amount:]
        chosen = sampler and sampler.of(rows)
        made = generate(pivoted, part, torch.ones_like(part), max_new_tokens, stopping, sampler=chosen, **options)
        out[rows, amount : amount + made.shape[1]] = made
    return out


def _behind_padding(front: Tensor, bodies: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """`front` [B, P] between each row's padding and its body, as a tokenizer puts it; ids and mask [B, P + T]."""
    ids = torch.cat([front, bodies], dim=1)
    for row, amount in enumerate(padding.tolist()):
        ids[row] = torch.cat([bodies[row, :amount], front[row], bodies[row, amount:]])
    columns = torch.arange(ids.shape[1], device=ids.device)
    return ids, (columns >= padding.to(ids.device)[:, None]).long()


def _from_nothing(
    pivoted: PivotedModel,
    bodies: Tensor,
    mask: Tensor,
    empty: Tensor,
    max_new_tokens: int,
    stopping: Stopping | None,
    sampler: RowSampler | None,
    options: dict[str, Any],
) -> Tensor:
    """Rows without a token: their first new token follows the pivot itself, the rest follow that token."""
    if not pivoted.token_ids:
        raise PivotError("generation from an empty text needs a pivot or a BOS token in front; this cell has neither")
    logits = pivoted.pivot_logits[-1:].expand(int(empty.sum()), -1).float()
    chosen = sampler and sampler.of(empty)
    first = chosen(bodies, logits).argmax(-1, keepdim=True) if chosen else _sample(logits, options)
    pad = int(options.get("pad_token_id") or 0)
    columns = bodies.new_full((len(bodies), bodies.shape[1] + max_new_tokens), pad)
    columns[:, : bodies.shape[1]] = bodies
    rest = first
    if max_new_tokens > 1:
        seen = torch.ones_like(first)
        rest = generate(pivoted, first, seen, max_new_tokens - 1, stopping, sampler=chosen, **options)
    ended = torch.isin(first[:, 0], first.new_tensor(eos_ids(pivoted.model)))
    rest[ended, 1:] = pad
    columns[empty, bodies.shape[1] : bodies.shape[1] + rest.shape[1]] = rest
    if not empty.all():
        others = sampler and sampler.of(~empty)
        full = generate(pivoted, bodies[~empty], mask[~empty], max_new_tokens, stopping, sampler=others, **options)
        columns[~empty, : full.shape[1]] = full
    return columns


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The model's end-of-sequence ids, however many."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]


def _sample(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """One token [B, 1] from logits [B, V] by generate's own options."""
    if not options.get("do_sample"):
        return logits.argmax(dim=-1, keepdim=True)
    changed = warped(logits, options.get("temperature"), options.get("top_k"), options.get("top_p"))
    return torch.multinomial(changed.softmax(dim=-1), 1)
