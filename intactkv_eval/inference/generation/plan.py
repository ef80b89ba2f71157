"""GenerationPlan: how many tokens a batch of rows goes on for, what ends each of them, and how tokens are chosen.

Knows tokens; no model but its end-of-sequence ids, and no cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from intactkv_eval.inference.generation.sampling import RowSampler

Stopping = Callable[[int, int], StoppingCriteriaList]
"""(columns before the first new token, rows) -> when to stop."""


@dataclass(frozen=True)
class GenerationPlan:
    """How the rows of a batch go on.

    beams: transformers repeats the ids of a row for them, not a given cache. by_length: whether a row must not have
    padding. in_one_go: whether an answer may not be made in several calls.
    """

    new_tokens: int
    stopping: Stopping | None
    sampler: RowSampler | None
    options: dict[str, Any]
    beams: int
    by_length: bool
    in_one_go: bool

    def ended(self, model: PreTrainedModel, ids: Tensor, prompt: int) -> bool:
        """Whether the one row `ids` [1, T] has ended with its last token, `prompt` columns of which were given."""
        eos = self.options.get("eos_token_id")
        ends = eos_ids(model) if eos is None else [eos] if isinstance(eos, int) else list(eos)
        stopping = self.stopping(prompt, 1) if self.stopping else []
        return int(ids[0, -1]) in ends or any(bool(torch.as_tensor(one(ids, None)).all()) for one in stopping)

    def behind(self, new_tokens: int) -> "GenerationPlan":
        """For rows to which so many new tokens were added already."""
        stopping = self.stopping
        moved = stopping and (lambda columns, rows: stopping(columns - new_tokens, rows))
        return replace(self, new_tokens=self.new_tokens - new_tokens, stopping=moved)

    def of(self, rows: Tensor) -> "GenerationPlan":
        """For the rows of a batch that `rows` [B] (bool) names."""
        return replace(self, sampler=self.sampler and self.sampler.of(rows))


def eos_ids(model: PreTrainedModel) -> list[int]:
    """The model's end-of-sequence ids, however many."""
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [] if eos is None else [eos]
