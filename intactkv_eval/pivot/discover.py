"""Finding pivot tokens: those whose hidden states are far larger than those of the tokens beside them.

    ratio[l, t] = max_c |h[l, t, c]| / median over t of max_c |h[l, t, c]|,    h: outputs of layer l
    share[l, t] = mean over heads and later tokens of the attention that they pay to t

A token is a pivot where its ratio reaches a threshold in some layer. What is found is a fact of one model on one text:
the same word may be a pivot where it is first said, and none later. Knows no quantizer.
Source: Sun et al. 2024, Massive Activations, section 2 (magnitudes); Xiao et al. 2023 (attention sinks).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.errors import PivotError


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

    def size(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = (output[0] if isinstance(output, tuple) else output)[0]
        sizes.append(hidden.abs().amax(dim=-1).double().cpu())

    def share(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            shares.append(received(output[1][0]))

    hooks = [layer.register_forward_hook(size) for layer in layers]
    if attention:
        parts = (part for layer in layers for part in layer.modules() if "Attention" in type(part).__name__)
        hooks += [part.register_forward_hook(share) for part in parts]
    inputs = torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
    try:
        with eager_attention(model) if attention else nullcontext():
            model.base_model(input_ids=inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
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


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts attention is computed the way that shows its weights."""
    before = model.config._attn_implementation
    if before == "eager":
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
