"""Generation behind a pivot: left-padded bodies in, the same bodies with the new tokens behind them out.

    intact:      ids = [pivot | left padding | body], mask = [1 | 0 | 1], cache = the pivot's rows
    not intact:  ids = [left padding | pivot | body], no cache given

Where the KV is quantized in groups, rows have no padding, and the cache holds all but the last token.
Knows tokens; stop strings and decoding of text are lm_eval's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from intactkv_eval.cache.group_cache import StreamCache
from intactkv_eval.cache.pivot_cache import PivotCache
from intactkv_eval.compat.cache_use import CountingCache, check_fresh_cache, generate_with_cache
from intactkv_eval.compat.rope_length import forget_long_texts
from intactkv_eval.compat.transformers_api import keeps_given_cache, set_output_cache
from intactkv_eval.errors import ConfigError, NumericsError, PivotError
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.row_sampler import BrokenLogits, FiniteLogits, RowSampler
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
    return _generated(pivoted, bodies, mask, _How(max_new_tokens, stopping, sampler, options), starts)


@dataclass(frozen=True)
class _How:
    """How rows go on."""

    new_tokens: int
    stopping: Stopping | None
    sampler: RowSampler | None
    options: dict[str, Any]

    @property
    def beams(self) -> int:
        """transformers repeats the ids of a row for its beams, not a given cache."""
        return int(self.options.get("num_beams") or 1)

    def ended(self, model: PreTrainedModel, ids: Tensor, prompt: int) -> bool:
        """Whether the one row `ids` [1, T] has ended with its last token, `prompt` columns of which were given."""
        eos = self.options.get("eos_token_id")
        ends = eos_ids(model) if eos is None else [eos] if isinstance(eos, int) else list(eos)
        stopping = self.stopping(prompt, 1) if self.stopping else []
        return int(ids[0, -1]) in ends or any(bool(torch.as_tensor(one(ids, None)).all()) for one in stopping)

    def behind(self, new_tokens: int) -> "_How":
        """For rows to which so many new tokens were added already."""
        stopping, options = self.stopping, dict(self.options)
        if options.get("min_new_tokens"):
            options["min_new_tokens"] = max(0, options["min_new_tokens"] - new_tokens)
        moved = stopping and (lambda columns, rows: stopping(columns - new_tokens, rows))
        return _How(self.new_tokens - new_tokens, moved, self.sampler, options)

    def of(self, rows: Tensor) -> "_How":
        """For the rows of a batch that `rows` [B] (bool) names."""
        return replace(self, sampler=self.sampler and self.sampler.of(rows))


def _generated(
    pivoted: PivotedModel, bodies: Tensor, mask: Tensor, how: _How, starts: SharedStart | None = None
) -> Tensor:
    padding = (mask == 0).sum(dim=1)
    # The last new token is never an input.
    longest = (len(pivoted.token_ids) + mask.shape[1] - padding + how.new_tokens - 1).tolist()
    crossing = torch.tensor([pivoted.rope.is_beyond(length) for length in longest], device=mask.device)
    if crossing.any():
        if len(crossing) > 1:
            rows = torch.arange(len(crossing), device=mask.device)
            alone = [rows == row for row in crossing.nonzero()[:, 0]]
            return _apart(pivoted, bodies, mask, [*alone, *([] if crossing.all() else [~crossing])], how)
        return _across(pivoted, bodies, mask, how)
    if pivoted.rope.grows:
        forget_long_texts(pivoted.model)
    return _up_to_border(pivoted, bodies, mask, how, starts)


def _across(pivoted: PivotedModel, body: Tensor, mask: Tensor, how: _How) -> Tensor:
    """One row [1, T] beyond the border of the RoPE frequencies, alone: in two parts where it begins before the border.

    What transformers does with a cache of its own: with longrope everything is computed again at the border; with
    dynamic NTK each token keeps the frequencies of its time.
    """
    length = len(pivoted.token_ids) + int(mask.sum())
    if not pivoted.rope.is_beyond(length):
        forget_long_texts(pivoted.model)
    fitting = pivoted.for_length(length)
    alone = pivoted.pivot is None and pivoted.writer is None and how.beams > 1
    if pivoted.rope.grows or alone:
        return _up_to_border(fitting, body, mask, how)
    if not pivoted.rope.is_beyond(length):
        if how.beams > 1:
            raise ConfigError(
                f"num_beams={how.beams}: a text grows beyond the {pivoted.rope.border} tokens from which on "
                f"{type(pivoted.model).__name__} has other RoPE frequencies: beams cannot go on there behind a pivot "
                "or with a quantized KV cache. Use num_beams=1, or shorter prompts and answers"
            )
        first = (pivoted.rope.border or 0) + 1 - length
        out = _up_to_border(pivoted, body, mask, replace(how, new_tokens=first))
        if out.shape[1] - body.shape[1] < first or how.ended(pivoted.model, out, body.shape[1]):
            return out
        grown = torch.nn.functional.pad(mask, (0, first), value=1)
        return _across(pivoted, out, grown, how.behind(first))
    with keeps_given_cache(pivoted.model):
        return _up_to_border(fitting, body, mask, how)


def _up_to_border(
    pivoted: PivotedModel, bodies: Tensor, mask: Tensor, how: _How, starts: SharedStart | None = None
) -> Tensor:
    """Rows that stay on one side of the border of the RoPE frequencies."""
    padding = (mask == 0).sum(dim=1)
    empty = padding == mask.shape[1]
    if empty.all():
        return torch.cat([bodies, _from_nothing(pivoted, bodies[:, mask.shape[1] :], how)], dim=1)
    if empty.any():
        return _apart(pivoted, bodies, mask, [empty, ~empty], how)
    rows = [row[amount:] for row, amount in zip(bodies.tolist(), padding.tolist(), strict=True)]
    front = starts.of(rows) if starts else None
    in_groups = pivoted.writer is not None and pivoted.writer.in_groups
    if (in_groups and padding.any()) or _padding_counts(pivoted, rows, front, how.new_tokens):
        lengths = [padding == amount for amount in sorted(set(padding.tolist()))]
        return _apart(pivoted, bodies, mask, lengths, how)
    if front is not None or pivoted.pivot is not None:
        ids, mask = _behind_front(rows, pivoted.token_ids, front, bodies)
    else:
        ids, mask = _behind_padding(_pivot_ids(pivoted, bodies), bodies, padding)
    turns = starts.turns if starts is not None and how.beams == 1 else None
    cache: PivotCache | StreamCache | None = None
    if in_groups:
        cache = pivoted.prefilled(ids.repeat_interleave(how.beams, 0))
    elif front is not None or turns is not None or pivoted.pivot is not None or pivoted.writer is not None:
        columns = (mask == 0).sum(dim=1).repeat_interleave(how.beams)
        cache = pivoted.new_cache(len(rows) * how.beams, columns, *([front.repeated(how.beams)] if front else []))
    out = _called(pivoted, rows, ids, mask, cache, how)
    if turns is not None and isinstance(cache, PivotCache) and len(out) == len(ids):
        turns.hold(out, torch.nn.functional.pad(mask, (0, out.shape[1] - ids.shape[1]), value=1), cache)
    return torch.cat([bodies, out[:, ids.shape[1] :]], dim=1)


def _called(
    pivoted: PivotedModel,
    rows: list[list[int]],
    ids: Tensor,
    mask: Tensor,
    cache: PivotCache | StreamCache | None,
    how: _How,
) -> Tensor:
    """transformers' generate; what a broken row of `rows` is broken by is looked for."""
    try:
        out: Tensor = generate_with_cache(
            pivoted.model,
            cache,
            ids,
            attention_mask=mask,
            max_new_tokens=how.new_tokens,
            stopping_criteria=how.stopping(ids.shape[1], len(ids)) if how.stopping else None,
            logits_processor=LogitsProcessorList([FiniteLogits(), *([how.sampler] if how.sampler else [])]),
            **how.options,
        )
    except BrokenLogits as error:
        broken = [*rows[error.place // how.beams], *error.tokens[ids.shape[1] :].tolist()]
        raise NumericsError(f"{error}: {_where(pivoted, broken)}") from None
    return out


def _where(pivoted: PivotedModel, row: list[int]) -> str:
    """Where a row, alone, has NaN or infinite numbers; of an empty one, the pivot's last token behind the pivot."""
    body = torch.tensor([row or pivoted.token_ids[-1:]], device=pivoted.device)
    with torch.no_grad():
        return where_not_finite(pivoted.model, partial(pivoted.body_logits, body))


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


def _apart(pivoted: PivotedModel, bodies: Tensor, mask: Tensor, groups: Sequence[Tensor], how: _How) -> Tensor:
    """Each of `groups` [B] (bool) by itself, without padding that all of its rows have, behind the pivot alone."""
    length = bodies.shape[1]
    out = bodies.new_full((len(bodies), length + how.new_tokens), int(how.options.get("pad_token_id") or 0))
    out[:, :length] = bodies
    for rows in groups:
        amount = int((mask[rows] == 0).sum(dim=1).min())
        made = _generated(pivoted, bodies[rows][:, amount:], mask[rows][:, amount:], how.of(rows))
        out[rows, amount : amount + made.shape[1]] = made
    return out


def _pivot_ids(pivoted: PivotedModel, bodies: Tensor) -> Tensor:
    """The pivot's tokens [B, P] for each of `bodies`."""
    return torch.tensor(pivoted.token_ids, dtype=torch.long, device=bodies.device).expand(len(bodies), -1)


def _behind_padding(front: Tensor, bodies: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """`front` [B, P] between each row's padding and its body, as a tokenizer puts it; ids and mask [B, P + T]."""
    ids = torch.cat([front, bodies], dim=1)
    for row, amount in enumerate(padding.tolist()):
        ids[row] = torch.cat([bodies[row, :amount], front[row], bodies[row, amount:]])
    columns = torch.arange(ids.shape[1], device=ids.device)
    return ids, (columns >= padding.to(ids.device)[:, None]).long()


def _from_nothing(pivoted: PivotedModel, bodies: Tensor, how: _How) -> Tensor:
    """What rows [B, 0] go on with behind the pivot's own tokens: [B, N]."""
    if not pivoted.token_ids:
        raise PivotError("generation from an empty text needs a pivot or a BOS token in front; this cell has neither")
    ids = _pivot_ids(pivoted, bodies)
    cache: PivotCache | StreamCache | None = None
    if pivoted.pivot is None and pivoted.writer is not None:
        every = ids.repeat_interleave(how.beams, 0)
        cache = pivoted.prefilled(every) if pivoted.writer.in_groups else pivoted.new_cache(len(every))
    with _answering_as_captured(pivoted) as given:
        made = _called(pivoted, [[]] * len(ids), ids, torch.ones_like(ids), cache, how)[:, ids.shape[1] :]
    for one in given:
        check_fresh_cache(pivoted.model, one, made.shape[1] - 1)
    return made


@contextmanager
def _answering_as_captured(pivoted: PivotedModel) -> Iterator[list[CountingCache]]:
    """The next output of the model is what an intact pivot's capture says: its last logits, and its rows alone.

    Yields a list that then holds the cache of these rows.
    """
    given: list[CountingCache] = []
    if pivoted.pivot is None:
        yield given
        return

    def replaced(module: Any, args: Any, output: Any) -> Any:
        hook.remove()
        rows = len(output.logits)
        output.logits = pivoted.pivot_logits[-1:].expand(rows, 1, -1)
        if pivoted.writer is not None and pivoted.writer.in_groups:
            ids = torch.tensor([[*pivoted.token_ids, 0]]).expand(rows, -1)
            given.append(pivoted.prefilled(ids))  # of all but the last, which are the pivot's
        else:
            given.append(pivoted.new_cache(rows))
        set_output_cache(output, given[0])
        return output

    hook = pivoted.model.register_forward_hook(replaced)
    try:
        yield given
    finally:
        hook.remove()


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The model's end-of-sequence ids, however many."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
