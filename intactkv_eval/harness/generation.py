"""Generation behind a pivot: left-padded bodies in, the same bodies with the new tokens behind them out.

    intact:      ids = [pivot | left padding | body], mask = [1 | 0 | 1], cache = the pivot's rows
    not intact:  ids = [left padding | pivot | body], no cache given

Knows tokens; stop strings and decoding of text are lm_eval's.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from intactkv_eval.cache.pivot_cache import PivotCache
from intactkv_eval.errors import PivotError
from intactkv_eval.harness.pivoted import PivotedModel


def generate(
    pivoted: PivotedModel,
    bodies: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    stopping: StoppingCriteriaList | None = None,
    **options: Any,
) -> Tensor:
    """Left-padded `bodies` [B, T] with `mask` [B, T] (1 where a token is) -> [B, T + N], N <= max_new_tokens.

    A row without any token gets its first one from the pivot's own logits. `options` are those of
    `transformers.generate`; `stopping` sees the tokens behind the pivot and the bodies.
    Raises PivotError for a row without a token where there is no pivot either.
    """
    empty = mask.sum(dim=1) == 0
    if empty.any():
        return _from_nothing(pivoted, bodies, mask, empty, max_new_tokens, stopping, options)
    length = len(pivoted.token_ids)
    front = torch.tensor(pivoted.token_ids, dtype=torch.long, device=bodies.device).expand(len(bodies), -1)
    cache: PivotCache | None = None
    if pivoted.pivot is not None:
        ids = torch.cat([front, bodies], dim=1)
        mask = torch.cat([torch.ones_like(front), mask], dim=1)
        cache = pivoted.new_cache(len(bodies))
    else:
        ids, mask = _behind_padding(front, bodies, mask)
        if pivoted.kv.bits < 16:
            first = (mask == 0).sum(dim=1)
            cache = PivotCache(pivoted.model.config, len(bodies), pivoted.kv, first_columns=first)
    out = pivoted.model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        stopping_criteria=_behind(stopping, length),
        use_cache=True,
        **options,
    )
    return torch.cat([bodies, out[:, length + bodies.shape[1] :]], dim=1)


def _behind_padding(front: Tensor, bodies: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Put `front` [B, P] between each row's padding and its body, as a tokenizer would have."""
    ids = torch.cat([front, bodies], dim=1)
    full = torch.cat([torch.ones_like(front), mask], dim=1)
    for row, padding in enumerate((mask == 0).sum(dim=1).tolist()):
        if padding:
            ids[row] = torch.cat([bodies[row, :padding], front[row], bodies[row, padding:]])
            full[row] = (torch.arange(full.shape[1], device=full.device) >= padding).to(full.dtype)
    return ids, full


def _behind(stopping: StoppingCriteriaList | None, length: int) -> StoppingCriteriaList | None:
    """lm_eval's criteria know where the prompt ends; behind a pivot it ends `length` tokens later."""
    for criterion in stopping or ():
        if hasattr(criterion, "initial_decoder_input_length"):
            criterion.initial_decoder_input_length += length
    return stopping


def _from_nothing(
    pivoted: PivotedModel,
    bodies: Tensor,
    mask: Tensor,
    empty: Tensor,
    max_new_tokens: int,
    stopping: StoppingCriteriaList | None,
    options: dict[str, Any],
) -> Tensor:
    """Rows without a token: their first new token follows the pivot itself, the rest follow that token."""
    if not pivoted.token_ids:
        raise PivotError("generation from an empty text needs a pivot or a BOS token in front; this cell has neither")
    logits = pivoted.pivot_logits[-1:].expand(int(empty.sum()), -1).float()
    first = _sample(logits, options)
    pad = int(options.get("pad_token_id") or 0)
    columns = bodies.new_full((len(bodies), bodies.shape[1] + max_new_tokens), pad)
    columns[:, : bodies.shape[1]] = bodies
    # lm_eval's criteria count the rows of the whole batch: for a part of it, generation runs to its length instead.
    whole_batch = stopping if empty.all() and not bodies.shape[1] else None
    rest = first
    if max_new_tokens > 1:
        rest = generate(pivoted, first, torch.ones_like(first), max_new_tokens - 1, whole_batch, **options)
    ended = torch.isin(first[:, 0], _eos(pivoted, first.device))
    rest[ended, 1:] = pad
    columns[empty, bodies.shape[1] : bodies.shape[1] + rest.shape[1]] = rest
    if not empty.all():
        full = generate(pivoted, bodies[~empty], mask[~empty], max_new_tokens, None, **options)
        columns[~empty, : full.shape[1]] = full
    return columns


def _eos(pivoted: PivotedModel, device: torch.device) -> Tensor:
    """The model's end-of-sequence ids, however many."""
    eos = pivoted.model.generation_config.eos_token_id
    listed = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return torch.tensor(listed, dtype=torch.long, device=device)


def _sample(logits: Tensor, options: dict[str, Any]) -> Tensor:
    """One token [B, 1] from logits [B, V] by generate's own options."""
    if not options.get("do_sample"):
        return logits.argmax(dim=-1, keepdim=True)
    warpers = LogitsProcessorList()
    if options.get("temperature") not in {None, 1.0}:
        warpers.append(TemperatureLogitsWarper(options["temperature"]))
    if options.get("top_k"):
        warpers.append(TopKLogitsWarper(options["top_k"]))
    if options.get("top_p") not in {None, 1.0}:
        warpers.append(TopPLogitsWarper(options["top_p"]))
    warped = warpers(torch.empty(0), logits)
    return torch.multinomial(warped.softmax(dim=-1), 1)
