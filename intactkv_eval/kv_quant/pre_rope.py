"""Scheme `pre_rope` (KVQuant, Hooper et al. 2024, sections 3.1 to 3.3): keys before RoPE, levels at uneven distances.

Keys: RoPE is undone at each row's position, each channel is scaled to [-1, 1] by its calibrated range, rounded to the
nearest of the layer's levels, scaled back and rotated again. Values: by the minimum and maximum of the token over all
of its heads. Of KVQuant's method left out are the weights of its k-means (sensitivity), the sparse outliers and Q-norm.
No row shares a dynamic parameter with another.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.kv_quant.rotary import Rotary, find_rotary
from intactkv_eval.kv_quant.scheme import working
from intactkv_eval.model.structure import cache_devices


class PreRope:
    """The levels of a model, on its devices. Raises ConfigError where they are of another number of layers."""

    group = 1
    recent = 0

    def __init__(self, levels: Codebook, model: PreTrainedModel) -> None:
        devices = cache_devices(model)
        if len(devices) != len(levels.low):
            raise ConfigError(
                f"kv_codebook: of {len(levels.low)} layers, this model has {len(devices)}: another model's"
            )
        self.rotary: Rotary = find_rotary(model)
        self._low = [low[:, None].to(device) for low, device in zip(levels.low, devices, strict=True)]
        self._high = [high[:, None].to(device) for high, device in zip(levels.high, devices, strict=True)]
        self._of_keys = [row.to(device) for row, device in zip(levels.key_levels, devices, strict=True)]
        self._of_values = [row.to(device) for row, device in zip(levels.value_levels, devices, strict=True)]

    def keys(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each number by its channel's range."""
        turn = self.rotary.at(positions, layer, states)
        plain = turn.undo(working(states))
        fake = _round_to_levels(plain, self._low[layer], self._high[layer], self._of_keys[layer])
        return turn.do(fake).to(states.dtype)

    def values(self, states: Tensor, layer: int, positions: Tensor) -> Tensor:
        """[B, H, T, D], each token by its own range over H and D."""
        rows = working(states)
        low, high = rows.amin(dim=(1, 3), keepdim=True), rows.amax(dim=(1, 3), keepdim=True)
        return _round_to_levels(rows, low, high, self._of_values[layer]).to(states.dtype)


def _round_to_levels(rows: Tensor, low: Tensor, high: Tensor, levels: Tensor) -> Tensor:
    """`rows` at the nearest level of the range [low, high] that [-1, 1] stands for; NaN where a row is not finite."""
    low, high, levels = low.to(rows.dtype), high.to(rows.dtype), levels.to(rows.dtype)
    spread = high - low
    scaled = 2 * (rows - low) / spread.clamp(min=torch.finfo(torch.float32).tiny) - 1
    nearest = levels[torch.bucketize(scaled.contiguous(), (levels[1:] + levels[:-1]) / 2)]
    broken = rows - rows  # 0, or NaN: a level is found for NaN too, and must not hide it
    return (nearest + 1) / 2 * spread + low + broken
