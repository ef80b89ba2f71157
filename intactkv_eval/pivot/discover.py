"""Finding pivot tokens: those whose hidden states are far larger than those of the tokens beside them.

    ratio[l, t] = max_c |h[l, t, c]| / median over t of max_c |h[l, t, c]|,    h: outputs of layer l
    share[l, t] = mean over heads and later tokens of the attention that they pay to t

A token is a pivot where its ratio reaches a threshold in some layer. What is found is a fact of one model on one text:
the same word may be a pivot where it is first said, and none later. Knows no quantizer.
Source: Sun et al. 2024, Massive Activations, section 2 (magnitudes); Xiao et al. 2023 (attention sinks).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.errors import PivotError
from intactkv_eval.model.hooks import attention_watched, hidden_of, watched


@dataclass(frozen=True, eq=False)
class Observation:
    """One text in one model. ids [T]; magnitudes [L, T] of each layer's outputs; share [L, T] of attention or None."""

    ids: tuple[int, ...]
    magnitudes: Tensor
    share: Tensor | None

    @property
    def ratios(self) -> Tensor:
        """[L, T]: magnitudes over their layer's median."""
        return self.magnitudes / self.magnitudes.median(dim=1, keepdim=True).values.clamp(min=1e-30)


@dataclass(frozen=True)
class Found:
    """A pivot token: its place, the layers where it is one, its greatest ratio, its share of attention in them."""

    token: int
    position: int
    layers: tuple[int, ...]
    ratio: float
    share: float | None


@torch.no_grad()
def observe(
    model: PreTrainedModel, layers: Sequence[nn.Module], ids: Sequence[int], attention: bool = True
) -> Observation:
    """Run `model`, whose decoder layers are `layers`, on the tokens `ids`.

    With `attention` the model computes it the eager way while it lasts. Raises PivotError for hidden states that are
    not finite, or attention that the model does not show.
    """
    sizes: list[Tensor] = []
    shares: list[Tensor] = []

    def size(output: Any) -> None:
        sizes.append(hidden_of(output)[0].abs().amax(dim=-1).double().cpu())

    def share(weights: Tensor) -> None:
        shares.append(received(weights))

    inputs = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    with watched(layers, size), attention_watched(model, layers, share) if attention else nullcontext():
        model.base_model(input_ids=inputs, **cache_argument(model.base_model, None))
    magnitudes = torch.stack(sizes)
    if not torch.isfinite(magnitudes).all():
        raise PivotError("hidden states are not finite: load the model with dtype=bfloat16 or float32")
    if attention and len(shares) != len(sizes):
        raise PivotError(f"{type(model).__name__} does not show its attention; leave it out with --no-attention")
    return Observation(tuple(ids), magnitudes, torch.stack(shares) if shares else None)


def received(weights: Tensor) -> Tensor:
    """Attention [H, T, T] -> the mean share [T] (fp64) that later tokens pay to each; the last one is paid nothing."""
    length = weights.shape[-1]
    later = weights.double().mean(dim=0).tril(-1).sum(dim=0).cpu()
    return later / torch.arange(length - 1, -1, -1).clamp(min=1)


def find(seen: Observation, threshold: float) -> list[Found]:
    """The pivot tokens of a text, in its order."""
    ratios = seen.ratios
    found = []
    for position in (ratios.amax(dim=0) >= threshold).nonzero()[:, 0].tolist():
        at = (ratios[:, position] >= threshold).nonzero()[:, 0]
        share = None if seen.share is None else float(seen.share[at, position].mean())
        layers = tuple(at.tolist())
        found.append(Found(seen.ids[position], position, layers, float(ratios[:, position].max()), share))
    return found
