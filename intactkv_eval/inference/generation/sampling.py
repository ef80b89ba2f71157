"""RowSampler: each row of a batch sampled by its own temperature and its own noise, or greedily.

    sample = argmax_v( log p_T(v) + g_v ),  g_v = -log e_v,  e_v ~ Exp(1)    (the Gumbel-max trick)

So an answer depends on its seed alone, not on what else is in the batch, and rows of all temperatures share one.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from intactkv_eval.errors import NumericsError

_GREEDY = 1e-4  # FastChat's own bound


@dataclass
class SamplingParams:
    """How one row is sampled: `temperature` below 1e-4 is greedy; `top_k` 0 and `top_p` 1 are off. seed: any text."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: str = ""
    _noise: torch.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(self.seed.encode()).digest()
        self._noise = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < _GREEDY

    def sampled(self, scores: Tensor) -> Tensor:
        """Logits [1, V] -> numbers [1, V] whose largest is the sample."""
        drawn = torch.empty(scores.shape).exponential_(generator=self._noise).clamp_min(torch.finfo().tiny)
        return warped(scores.float(), self.temperature, self.top_k, self.top_p) - drawn.log().to(scores.device)


def warped(scores: Tensor, temperature: float | None, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [B, V] as transformers' sampling changes them; None, a temperature or `top_p` of 1, `top_k` 0 are off."""
    warpers = LogitsProcessorList()
    if temperature not in {None, 1.0}:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p not in {None, 1.0}:
        warpers.append(TopPLogitsWarper(top_p))
    found: Tensor = warpers(torch.empty(0), scores)
    return found


class BrokenLogits(NumericsError):
    """place: of the first row without a next token. tokens [T]: what stands in it, padding in front and new ones."""

    def __init__(self, place: int, tokens: Tensor) -> None:
        super().__init__("the logits of a new token are NaN or infinite")
        self.place, self.tokens = place, tokens


class FiniteLogits(LogitsProcessor):  # type: ignore[misc]
    """Raises BrokenLogits for logits that hold NaN or +inf, from which argmax would make tokens like any other."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] -> the same."""
        broken = scores.isnan().any(-1) | scores.isposinf().any(-1) | scores.isneginf().all(-1)
        if broken.any():
            place = int(broken.int().argmax())
            raise BrokenLogits(place, input_ids[place])
        return scores


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """A row's draw for each row of a batch; generation itself stays greedy."""

    def __init__(self, draws: Sequence[SamplingParams]) -> None:
        self.draws = list(draws)

    def of(self, rows: Tensor) -> "RowSampler":
        """For the rows of a batch that `rows` [B] (bool) names."""
        return RowSampler([draw for draw, wanted in zip(self.draws, rows.tolist(), strict=True) if wanted])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] -> the same, sampled rows with their noise."""
        if all(draw.is_greedy for draw in self.draws):
            return scores
        out = scores.float().clone()
        for row, draw in enumerate(self.draws):
            if not draw.is_greedy:
                out[row] = draw.sampled(scores[row : row + 1])[0]
        return out
