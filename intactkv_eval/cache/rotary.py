"""Undoing and redoing RoPE on keys of a cache, with the model's own rotary embedding.

    k' = k cos + h(k) sin,   h(k) = [-k2, k1] of k's halves         k = (k' cos - h(k') sin) / (cos^2 + sin^2)

Rotated are the first channels where cos has fewer than a head. Which layers rotate is tried, not looked up: behind one
token again and again every layer computes the same key at each position, but for its rotation.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.cache.scheme import working
from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.structure import text_config

_TRIED = 12  # positions
_STEADY = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative RMS over positions of keys without a rotation; 16 bits:
_STEADY_16_BITS = 5e-2
_UNDONE = 0.3  # of what the rotation made: rounding in 16 bits leaves less, a wrong rotation about all of it
_NAMES = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base")


@dataclass(frozen=True, eq=False)
class Turn:
    """cos, sin: [B or 1, 1, T, R] of some rows; None where the layer does not rotate."""

    cos: Tensor | None
    sin: Tensor | None

    def do(self, keys: Tensor) -> Tensor:
        """[B, H, T, D] before RoPE -> after it."""
        if self.cos is None or self.sin is None:
            return keys
        part, rest = keys[..., : self.cos.shape[-1]], keys[..., self.cos.shape[-1] :]
        return torch.cat([part * self.cos + _half_turned(part) * self.sin, rest], dim=-1)

    def undo(self, keys: Tensor) -> Tensor:
        """[B, H, T, D] after RoPE -> before it."""
        if self.cos is None or self.sin is None:
            return keys
        part, rest = keys[..., : self.cos.shape[-1]], keys[..., self.cos.shape[-1] :]
        plain = (part * self.cos - _half_turned(part) * self.sin) / (self.cos.square() + self.sin.square())
        return torch.cat([plain, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class Rotary:
    """A model's rotary embedding, each layer's kind where it has several, and which layers rotate at all."""

    module: nn.Module | None
    kinds: tuple[str | None, ...]
    rotates: tuple[bool, ...]

    def at(self, positions: Tensor, layer: int, states: Tensor) -> Turn:
        """The rotation of rows at `positions` [B or 1, T] (of padding any), in the precision they are worked in."""
        if self.module is None or not self.rotates[layer]:
            return Turn(None, None)
        kind = self.kinds[layer]
        named = {} if kind is None else {"layer_type": kind}
        like = working(states[:1, 0, :1])
        places = positions.to(states.device).clamp(min=0)
        cos, sin = self.module(like, position_ids=places, **named)
        return Turn(cos[:, None].to(like), sin[:, None].to(like))


def _half_turned(part: Tensor) -> Tensor:
    one, other = part.chunk(2, dim=-1)
    return torch.cat([-other, one], dim=-1)


def find_rotary(model: PreTrainedModel) -> Rotary:
    """The rotary embedding of `model`, tried. Raises UnsupportedModelError where its rotation cannot be undone."""
    keys = _keys_of_one_token(model)
    module = next((part for name, part in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"), None)
    config: Any = text_config(model)
    if module is None:
        named = next((name for name in _NAMES if getattr(config, name, None)), None)
        if named is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} rotates its keys (config.{named}) but has no module rotary_emb: "
                "kv_scheme=pre_rope cannot undo it; use token_head or channel_key"
            )
        return Rotary(None, (None,) * len(keys), (False,) * len(keys))
    by_kind = "layer_type" in inspect.signature(module.forward).parameters
    kinds = tuple(config.layer_types) if by_kind else (None,) * len(keys)
    rotary = Rotary(module, kinds, (True,) * len(keys))
    positions = torch.arange(_TRIED)[None]
    rotates = []
    for layer, states in enumerate(keys):
        raw = _change(states)
        undone = _change(rotary.at(positions, layer, states).undo(working(states)))
        if raw > _STEADY.get(model.dtype, _STEADY_16_BITS) and undone > _UNDONE * raw:
            raise UnsupportedModelError(
                f"{type(model).__name__}, layer {layer}: undoing its RoPE does not give the keys before it, it rotates "
                "in another way (interleaved channels?); use kv_scheme=token_head or channel_key"
            )
        rotates.append(undone <= _UNDONE * raw)
    return Rotary(module, kinds, tuple(rotates))


@torch.no_grad()
def _keys_of_one_token(model: PreTrainedModel) -> list[Tensor]:
    cache = CountingCache()
    embeddings = model.get_input_embeddings().weight
    ids = torch.full((1, _TRIED), min(11, len(embeddings) - 1), device=embeddings.device)
    run_with_cache(model, cache, ids)
    return [layer.keys for layer in cache.layers]


def _change(keys: Tensor) -> float:
    """How much keys [1, H, T, D] differ over positions: RMS, relative to their own."""
    rows = keys.double()
    return float((rows - rows.mean(dim=2, keepdim=True)).square().mean().sqrt() / rows.square().mean().sqrt())
