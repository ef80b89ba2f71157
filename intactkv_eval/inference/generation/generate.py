"""Generation behind a pivot: left-padded bodies in, the same bodies with the new tokens behind them out.

    intact:      ids = [pivot | left padding | body], mask = [1 | 0 | 1], cache = the pivot's rows
    not intact:  ids = [left padding | pivot | body], no cache given

Where the KV is quantized in groups, rows have no padding, and the cache holds all but the last token.
Knows tokens; stop strings and decoding of text are lm_eval's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from intactkv_eval.compat.cache_use import CountingCache, check_fresh_cache, generate_with_cache
from intactkv_eval.compat.rope_length import forget_long_texts
from intactkv_eval.compat.transformers_api import keeps_given_cache, set_output_cache
from intactkv_eval.errors import ConfigError, NumericsError, PivotError
from intactkv_eval.inference.generation.plan import GenerationPlan, Stopping
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.generation.sampling import BrokenLogits, FiniteLogits, RowSampler
from intactkv_eval.inference.generation.settings import refusals_explained, served
from intactkv_eval.inference.generation.turn_cache import PrefixKV
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_cache.grouped import StreamCache
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.model.hooks import where_not_finite


def generate(
    pivoted: PivotedModel,
    bodies: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stopping: Stopping | None = None,
    starts: PrefixCache | None = None,
    sampler: RowSampler | None = None,
    **options: Any,
) -> Tensor:
    """Left-padded `bodies` [B, T] with `mask` [B, T] (1 where a token is) -> [B, T + N], N <= max_new_tokens.

    A row without any token gets its first one from the pivot's own logits. `options` are those of
    `transformers.generate`, over those of the model's generation_config (generation_settings.py). Rows that cannot
    share a batch are generated in several. starts: keeps the KV of a start that requests have in common, and of
    earlier turns. sampler: how each row is sampled, instead of by `options`.
    Raises PivotError for a row without a token where there is no pivot either, ConfigError for settings that cannot be
    served, or that transformers refuses.
    """
    found = served(pivoted.model.generation_config, options, pivoted.kv_quantizer is not None)
    in_one_go = found.beams > 1 or found.in_one_go
    plan = GenerationPlan(max_new_tokens, stopping, sampler, found.options, found.beams, found.by_length, in_one_go)
    return _generated(pivoted, bodies, mask, plan, starts)


def _generated(
    pivoted: PivotedModel, bodies: Tensor, mask: Tensor, plan: GenerationPlan, starts: PrefixCache | None = None
) -> Tensor:
    padding = (mask == 0).sum(dim=1)
    # The last new token is never an input.
    longest = (len(pivoted.token_ids) + mask.shape[1] - padding + plan.new_tokens - 1).tolist()
    crossing = torch.tensor([pivoted.rope.is_beyond(length) for length in longest], device=mask.device)
    if crossing.any():
        if len(crossing) > 1:
            rows = torch.arange(len(crossing), device=mask.device)
            alone = [rows == row for row in crossing.nonzero()[:, 0]]
            return _apart(pivoted, bodies, mask, [*alone, *([] if crossing.all() else [~crossing])], plan)
        return _across(pivoted, bodies, mask, plan)
    if pivoted.rope.grows:
        forget_long_texts(pivoted.model)
    return _up_to_border(pivoted, bodies, mask, plan, starts)


def _across(pivoted: PivotedModel, body: Tensor, mask: Tensor, plan: GenerationPlan) -> Tensor:
    """One row [1, T] beyond the border of the RoPE frequencies, alone: in two parts where it begins before the border.

    What transformers does with a cache of its own: with longrope everything is computed again at the border; with
    dynamic NTK each token keeps the frequencies of its time.
    """
    length = len(pivoted.token_ids) + int(mask.sum())
    if not pivoted.rope.is_beyond(length):
        forget_long_texts(pivoted.model)
    fitting = pivoted.for_length(length)
    alone = pivoted.pivot is None and pivoted.kv_quantizer is None and plan.in_one_go
    if pivoted.rope.grows or alone:
        return _up_to_border(fitting, body, mask, plan)
    if not pivoted.rope.is_beyond(length):
        if plan.in_one_go:
            raise ConfigError(
                f"a text grows beyond {pivoted.rope.border} tokens; {type(pivoted.model).__name__} has other RoPE "
                "frequencies there, and beams (num_beams), and settings that count from the end of the prompt "
                "(min_new_tokens, ...), cannot go on behind a pivot or with a quantized KV cache: leave them out, or "
                "use shorter prompts and answers"
            )
        first = (pivoted.rope.border or 0) + 1 - length
        out = _up_to_border(pivoted, body, mask, replace(plan, new_tokens=first))
        if out.shape[1] - body.shape[1] < first or plan.ended(pivoted.model, out, body.shape[1]):
            return out
        grown = torch.nn.functional.pad(mask, (0, first), value=1)
        return _across(pivoted, out, grown, plan.behind(first))
    with keeps_given_cache(pivoted.model):
        return _up_to_border(fitting, body, mask, plan)


def _up_to_border(
    pivoted: PivotedModel, bodies: Tensor, mask: Tensor, plan: GenerationPlan, starts: PrefixCache | None = None
) -> Tensor:
    """Rows that stay on one side of the border of the RoPE frequencies."""
    padding = (mask == 0).sum(dim=1)
    empty = padding == mask.shape[1]
    if empty.all():
        return torch.cat([bodies, _from_nothing(pivoted, bodies[:, mask.shape[1] :], plan)], dim=1)
    if empty.any():
        return _apart(pivoted, bodies, mask, [empty, ~empty], plan)
    rows = [row[amount:] for row, amount in zip(bodies.tolist(), padding.tolist(), strict=True)]
    front = starts.of(rows) if starts else None
    in_groups = pivoted.kv_quantizer is not None and pivoted.kv_quantizer.in_groups
    apart = (in_groups or plan.by_length) and padding.any()
    if apart or _padding_counts(pivoted, rows, front, plan.new_tokens):
        lengths = [padding == amount for amount in sorted(set(padding.tolist()))]
        return _apart(pivoted, bodies, mask, lengths, plan)
    if front is not None or pivoted.pivot is not None:
        ids, mask = _behind_front(rows, pivoted.token_ids, front, bodies)
    else:
        ids, mask = _behind_padding(_pivot_ids(pivoted, bodies), bodies, padding)
    turns = starts.turns if starts is not None and plan.beams == 1 else None
    cache: PivotCache | StreamCache | None = None
    if in_groups:
        cache = pivoted.prefilled(ids.repeat_interleave(plan.beams, 0))
    elif front is not None or turns is not None or pivoted.pivot is not None or pivoted.kv_quantizer is not None:
        columns = (mask == 0).sum(dim=1).repeat_interleave(plan.beams)
        cache = pivoted.new_cache(len(rows) * plan.beams, columns, *([front.repeated(plan.beams)] if front else []))
    out = _called(pivoted, rows, ids, mask, cache, plan)
    if turns is not None and isinstance(cache, PivotCache) and len(out) == len(ids):
        turns.hold(out, torch.nn.functional.pad(mask, (0, out.shape[1] - ids.shape[1]), value=1), cache)
    return torch.cat([bodies, out[:, ids.shape[1] :]], dim=1)


def _called(
    pivoted: PivotedModel,
    rows: list[list[int]],
    ids: Tensor,
    mask: Tensor,
    cache: PivotCache | StreamCache | None,
    plan: GenerationPlan,
) -> Tensor:
    """transformers' generate; what a broken row of `rows` is broken by is looked for."""
    try:
        with refusals_explained(pivoted.model, plan.options):
            out: Tensor = generate_with_cache(
                pivoted.model,
                cache,
                ids,
                attention_mask=mask,
                max_new_tokens=plan.new_tokens,
                stopping_criteria=plan.stopping(ids.shape[1], len(ids)) if plan.stopping else None,
                logits_processor=LogitsProcessorList([FiniteLogits(), *([plan.sampler] if plan.sampler else [])]),
                **plan.options,
            )
    except BrokenLogits as error:
        broken = [*rows[error.place // plan.beams], *error.tokens[ids.shape[1] :].tolist()]
        raise NumericsError(f"{error}: {_where(pivoted, broken)}") from None
    return out


def _where(pivoted: PivotedModel, row: list[int]) -> str:
    """Where a row, alone, has NaN or infinite numbers; of an empty one, the pivot's last token behind the pivot."""
    body = torch.tensor([row or pivoted.token_ids[-1:]], device=pivoted.device)
    with torch.no_grad():
        return where_not_finite(pivoted.model, partial(pivoted.body_logits, body))


def _behind_front(
    rows: list[list[int]], pivot: tuple[int, ...], front: PrefixKV | None, bodies: Tensor
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


def _padding_counts(pivoted: PivotedModel, rows: list[list[int]], front: PrefixKV | None, new_tokens: int) -> bool:
    """Whether padding would stand behind kept rows, in a model that counts columns: it would push them away."""
    if front is None and pivoted.pivot is None:
        return False
    held = [len(tokens) for tokens in front.tokens] if front is not None else [0] * len(rows)
    rest = [len(row) - length for row, length in zip(rows, held, strict=True)]
    if len(set(rest)) == 1:
        return False
    return pivoted.columns.counted(len(pivoted.token_ids) + max(held) + max(rest) + new_tokens)


def _apart(
    pivoted: PivotedModel, bodies: Tensor, mask: Tensor, groups: Sequence[Tensor], plan: GenerationPlan
) -> Tensor:
    """Each of `groups` [B] (bool) by itself, without padding that all of its rows have, behind the pivot alone."""
    length = bodies.shape[1]
    out = bodies.new_full((len(bodies), length + plan.new_tokens), int(plan.options.get("pad_token_id") or 0))
    out[:, :length] = bodies
    for rows in groups:
        amount = int((mask[rows] == 0).sum(dim=1).min())
        made = _generated(pivoted, bodies[rows][:, amount:], mask[rows][:, amount:], plan.of(rows))
        out[rows, amount : amount + made.shape[1]] = made
    return out


def _pivot_ids(pivoted: PivotedModel, bodies: Tensor) -> Tensor:
    """The pivot's tokens [B, P] for each of `bodies`."""
    return torch.tensor(pivoted.token_ids, dtype=torch.long, device=bodies.device).expand(len(bodies), -1)


def _behind_padding(front: Tensor, bodies: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """`front` [B, P] between each row's padding and its body, as a tokenizer puts it; ids and mask [B, P + T].

    Padding is a token of the row itself: a tokenizer's own may be no word of the model.
    """
    ids = torch.cat([front, bodies], dim=1)
    for row, amount in enumerate(padding.tolist()):
        ids[row] = torch.cat([bodies[row, amount].expand(amount), front[row], bodies[row, amount:]])
    columns = torch.arange(ids.shape[1], device=ids.device)
    return ids, (columns >= padding.to(ids.device)[:, None]).long()


def _from_nothing(pivoted: PivotedModel, bodies: Tensor, plan: GenerationPlan) -> Tensor:
    """What rows [B, 0] go on with behind the pivot's own tokens: [B, N]."""
    if not pivoted.token_ids:
        raise PivotError("generation from an empty text needs a pivot or a BOS token in front; this cell has neither")
    ids = _pivot_ids(pivoted, bodies)
    cache: PivotCache | StreamCache | None = None
    if pivoted.pivot is None and pivoted.kv_quantizer is not None:
        every = ids.repeat_interleave(plan.beams, 0)
        cache = pivoted.prefilled(every) if pivoted.kv_quantizer.in_groups else pivoted.new_cache(len(every))
    with _answering_as_captured(pivoted) as given:
        made = _called(pivoted, [[]] * len(ids), ids, torch.ones_like(ids), cache, plan)[:, ids.shape[1] :]
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
        if pivoted.kv_quantizer is not None and pivoted.kv_quantizer.in_groups:
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
