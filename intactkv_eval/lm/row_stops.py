"""What ends each row of a batch by itself: stop strings, as lm_eval's `hf` looks for them in a batch of one.

lm_eval's own criteria end a batch when all of its rows have met a stop string, and let the other rows go on until then.
What a row says beyond a stop that is a special token (an EOS that generation_config.json does not name, ChatML's
<|im_end|>) would then stand in its text, since such a token is not decoded, and nothing is cut there.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from intactkv_eval.compat.lm_eval_api import stop_sequences_criteria


class RowStops(StoppingCriteria):  # type: ignore[misc]
    """True for each row [B] that has met one of the `stops`; of beams [B * K], for all of the row whose best has."""

    eos_token_id: tuple[int, ...] = ()  # transformers fills up ended rows where a criterion has this attribute

    def __init__(self, tokenizer: Any, stops: list[str], columns: int, rows: int) -> None:
        self.rows = rows
        self.criteria: list[Any] = list(stop_sequences_criteria(tokenizer, stops, columns, rows))

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Tokens [B, T] -> [B] (bool)."""
        beams = len(input_ids) // self.rows
        ended = torch.zeros(self.rows, dtype=torch.bool)
        for criterion in self.criteria:
            criterion(input_ids[::beams], scores)
            ended |= torch.tensor(criterion.done_tracker)
        return ended.repeat_interleave(beams).to(input_ids.device)


def row_stops(tokenizer: Any, stops: list[str], columns: int, rows: int) -> StoppingCriteriaList:
    """`RowStops` for new tokens from column `columns` on."""
    return StoppingCriteriaList([RowStops(tokenizer, stops, columns, rows)])


def filling_token(tokenizer: Any, words: int, but: Collection[int] = ()) -> int | None:
    """A token that fills up ended rows: a special one, which is not decoded, and one of the model's `words`.

    None where there is no such token: rows must then be generated alone.
    """
    named = [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, *tokenizer.all_special_ids]
    special = set(tokenizer.all_special_ids)
    return next((one for one in named if one in special and 0 <= one < words and one not in but), None)
