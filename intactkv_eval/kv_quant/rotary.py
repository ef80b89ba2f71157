"""Undoing and redoing RoPE on keys of a cache, with the model's own rotary embedding.

    k' = k cos + h(k) sin         k = (k' cos - h(k') sin) / (cos^2 + sin^2)

Channels are rotated in pairs, which h turns by a quarter: of halves, h(k) = [-k2, k1], or of neighbours (Cohere, GLM,
Ernie). cos and sin have a number for each channel, or one for each pair (gpt-oss), or are laid out for halves where
neighbours are rotated; nanochat turns the other way, GPT-J gives sin first. Rotated are the first channels where cos
has fewer than a head. Which of these a model does, and which of its layers rotate at all, is tried, not looked up: of
the same hidden states at each position every layer computes the same key, but for its rotation.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.kv_quant.latent import change_over_positions, check_keys_are_cached, rows_of_one_token
from intactkv_eval.kv_quant.scheme import working
from intactkv_eval.model.structure import decoder_layers, text_config

_UNDONE = 0.3  # of what the rotation made: rounding in 16 bits leaves less, a wrong rotation about all of it
_NAMES = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base")


_STEADY = {torch.float64: 1e-6, torch.float32: 1e-3}  # relative RMS over positions of keys without a rotation; 16 bits:
_STEADY_16_BITS = 5e-2


@dataclass(frozen=True)
class RotaryLayout:
    """Which channels are a pair: those of two halves, or neighbours. angles: how cos and sin come from the module.

    `channel`: one for each channel. `pair`: one for each pair. `halves`: laid out for halves, though the pairs are
    neighbours. backwards: pairs turn the other way. sine_first: the module gives sin and cos.
    """

    neighbours: bool
    angles: Literal["channel", "pair", "halves"]
    backwards: bool = False
    sine_first: bool = False

    def spread(self, angles: Tensor) -> Tensor:
        """The module's cos or sin [..., N] -> one for each rotated channel [..., R]."""
        if self.angles == "halves":
            angles = angles[..., : angles.shape[-1] // 2]
        if self.angles == "channel":
            return angles
        return angles.repeat_interleave(2, dim=-1) if self.neighbours else torch.cat([angles, angles], dim=-1)

    def quarter_turn(self, part: Tensor) -> Tensor:
        """Each pair (a, b) of the channels [..., R] -> (-b, a)."""
        if self.neighbours:
            turned = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        else:
            one, other = part.chunk(2, dim=-1)
            turned = torch.cat([-other, one], dim=-1)
        return -turned if self.backwards else turned


# The order in which they are tried: most models are of the first.
_LAYOUTS = (
    RotaryLayout(False, "channel"),
    RotaryLayout(False, "pair"),
    RotaryLayout(True, "channel"),
    RotaryLayout(True, "pair"),
    RotaryLayout(True, "halves"),
    RotaryLayout(False, "channel", backwards=True),
    RotaryLayout(True, "pair", sine_first=True),
)


@dataclass(frozen=True, eq=False)
class RotaryTurn:
    """cos, sin: [B or 1, 1, T, R] of some rows; None where the layer does not rotate."""

    cos: Tensor | None
    sin: Tensor | None
    layout: RotaryLayout = _LAYOUTS[0]

    def do(self, keys: Tensor) -> Tensor:
        """[B, H, T, D] before RoPE -> after it."""
        if self.cos is None or self.sin is None:
            return keys
        part, rest = keys[..., : self.cos.shape[-1]], keys[..., self.cos.shape[-1] :]
        return torch.cat([part * self.cos + self.layout.quarter_turn(part) * self.sin, rest], dim=-1)

    def undo(self, keys: Tensor) -> Tensor:
        """[B, H, T, D] after RoPE -> before it."""
        if self.cos is None or self.sin is None:
            return keys
        part, rest = keys[..., : self.cos.shape[-1]], keys[..., self.cos.shape[-1] :]
        plain = (part * self.cos - self.layout.quarter_turn(part) * self.sin) / (self.cos.square() + self.sin.square())
        return torch.cat([plain, rest], dim=-1)


@dataclass(frozen=True, eq=False)
class Rotary:
    """A model's rotary embedding, each layer's kind where it has several, which layers rotate, and which channels."""

    module: nn.Module | None
    kinds: tuple[str | None, ...]
    rotates: tuple[bool, ...]
    layout: RotaryLayout = _LAYOUTS[0]

    def at(self, positions: Tensor, layer: int, states: Tensor) -> RotaryTurn:
        """The rotation of rows at `positions` [B or 1, T] (of padding any), in the precision they are worked in."""
        if self.module is None or not self.rotates[layer]:
            return RotaryTurn(None, None)
        kind = self.kinds[layer]
        named = {} if kind is None else {"layer_type": kind}
        like = working(states[:1, 0, :1])
        places = positions.to(states.device).clamp(min=0)
        cos, sin = self.module(like, position_ids=places, **named)
        cos, sin = (sin, cos) if self.layout.sine_first else (cos, sin)
        cos, sin = (self.layout.spread(part[:, None].to(like)) for part in (cos, sin))
        return RotaryTurn(cos, sin, self.layout)


def find_rotary(model: PreTrainedModel) -> Rotary:
    """The rotary embedding of `model`, tried. Raises UnsupportedModelError where its rotation cannot be undone."""
    check_keys_are_cached(model, "pre_rope")
    keys = [rows[0] for rows in rows_of_one_token(model)]
    module = _module(model)
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
    kinds = tuple(config.layer_types)[: len(keys)] if by_kind else (None,) * len(keys)
    steady = _STEADY.get(model.dtype, _STEADY_16_BITS)
    failed = 0
    for layout in _LAYOUTS:
        result = _tried(Rotary(module, kinds, (True,) * len(keys), layout), keys, steady)
        if isinstance(result, Rotary):
            return result
        failed = max(failed, result)
    raise UnsupportedModelError(
        f"{type(model).__name__}, layer {failed}: undoing its RoPE does not give the same key of a token at every "
        f"position, in none of the ways that are known: not all of what moves its keys is a rotation of the first "
        "channels, by pairs of halves or of neighbours; use kv_scheme=token_head or channel_key"
    )


def _module(model: PreTrainedModel) -> nn.Module | None:
    """The module rotary_emb of the decoder whose layers cache: a vision tower may have one of the same name."""
    owner = decoder_layers(model)[0].rpartition(".")[0]
    named = {name: part for name, part in model.named_modules() if name.rpartition(".")[2] == "rotary_emb"}
    inside = [part for name, part in named.items() if not owner or name.startswith(f"{owner}.")]
    return next(iter(inside), None)


def _tried(rotary: Rotary, keys: list[Tensor], steady: float) -> Rotary | int:
    """`rotary` with the layers that rotate as it does, or the first layer whose keys it does not explain."""
    positions = torch.arange(keys[0].shape[2])[None]
    rotates = []
    for layer, states in enumerate(keys):
        raw = change_over_positions(states)
        try:
            undone = change_over_positions(rotary.at(positions, layer, states).undo(working(states)))
        except (RuntimeError, TypeError, ValueError):  # angles of another number of channels, or no cos and sin
            return layer
        if raw > steady and not undone <= _UNDONE * raw:
            return layer
        rotates.append(undone <= _UNDONE * raw)
    return replace(rotary, rotates=tuple(rotates))
