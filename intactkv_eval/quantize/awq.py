"""AWQ: scale up the input channels that matter, by a search, and clip the weights, by another; then round to nearest.

    s = a**r,  a = mean |x| of each channel,  r in {0, 1/20, ..., 19/20},  s /= sqrt(max(s) min(s))
    r = argmin |f(x; Q(W diag(s)) diag(1/s)) - f(x; W)|^2,   f: the parent module (attention, MLP, or the layer itself)
    c = argmin |Q(clip(W, -c, c)) x - W x|^2 of each group,  c in {1, ..., 0.5} max|W|

s is folded into what is before (scale_groups.py). r = 0 is plain rounding, so the output of no parent gets worse than
RTN's. q and k are not clipped: their errors meet in a product. The block computes with its own scales until all
searches are over: each sees the full-precision function, also where a pivot's values are in front.
Source: Lin et al. 2023, sections 3.2 and 5; llm-awq's auto_scale.py and auto_clip.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from intactkv_eval.cell.spec import SymmetricFormula
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.model.families import ScaleGroup
from intactkv_eval.quantize.awq_search import clipped
from intactkv_eval.quantize.method import Block, check_settings, install
from intactkv_eval.quantize.rtn import fake_quantize, group_range, quantize_rtn
from intactkv_eval.quantize.scale_groups import fold, scale_groups
from intactkv_eval.quantize.trial import Inputs, inputs_of, output_of, substituted
from intactkv_eval.weights.quantized import QuantizedWeight, check_group_size

SCALES = torch.float16  # as all formats hold them
_SEARCH_TOKENS = 8192  # of whole samples, on which a ratio is judged; the means are over all
_CLIP_TOKENS = 512
_CLIP_STEPS, _CLIP_LEAST = 20, 0.5
_CLIP_ROWS = 256
_UNCLIPPED = ("q_proj", "k_proj", "qkv_proj")


@dataclass(frozen=True)
class AWQ:
    """The search of Lin et al.; `grid` ratios, and clipping or not. Raises ConfigError for what is no setting."""

    bits: int
    group_size: int
    symmetric: SymmetricFormula | None = None
    grid: int = 20
    clip: bool = True
    wants_full_inputs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        if self.grid < 1:
            raise ConfigError(f"awq: grid={self.grid}: use the number of ratios to try, 1 or more (20 in the paper)")

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See Method. Raises UnsupportedModelError where no places for scales are known, ConfigError for a group_size
        that does not fit, CheckpointError where activations are not finite."""
        groups = scale_groups(block)
        for name, layer in block.layers.items():
            self._size(layer.get_parameter("weight"), f"{block.name}.{name}")
        kept, samples, scales = _kept(block), {}, []
        for group in groups:
            seen = inputs_of(block, group.layers[0], kept)
            scale = self._search(block, group, seen, kept)
            scales.append((group, scale))
            samples.update(dict.fromkeys(group.layers, _few(seen.samples) / scale))
        clips = [name for name in block.layers if self.clip and name.rpartition(".")[2] not in _UNCLIPPED]
        for name in clips:
            if name not in samples:
                samples[name] = _few(inputs_of(block, name, kept).samples)
        found = {}
        for name, matrix in fold(block, scales).items():
            largest = self.clip_search(matrix, samples[name]) if name in clips else None
            found[name] = quantize_rtn(
                clipped(matrix, largest), self.bits, self.group_size, self.symmetric, f"{block.name}.{name}", SCALES
            )
        install(block, found)
        return {name: found[name] for name in block.layers}

    @torch.no_grad()
    def clip_search(self, matrix: Tensor, tokens: Tensor) -> Tensor:
        """The magnitude [O, G] at which to cut each group of `matrix` [O, I], judged on inputs `tokens` [T, I]."""
        size = self._size(matrix, "the layer")
        groups = _triangle(tokens.view(len(tokens), -1, size).transpose(0, 1))
        found = []
        for rows in torch.split(matrix, _CLIP_ROWS):
            largest = rows.abs().view(len(rows), -1, size).amax(dim=-1)
            best, least = largest, torch.full_like(largest, math.inf)
            for step in range(_CLIP_STEPS + 1):
                bound = largest * (1 - (1 - _CLIP_LEAST) * step / _CLIP_STEPS)
                difference = (self._fake(clipped(rows, bound)) - rows).view(len(rows), -1, size)
                error = (difference.float().transpose(0, 1) @ groups.mT).square().sum(dim=-1).T
                best, least = torch.where(error < least, bound, best), torch.minimum(error, least)
            found.append(best)
        return torch.cat(found)

    @torch.no_grad()
    def _search(self, block: Block, group: ScaleGroup, seen: Inputs, kept: list[int]) -> Tensor:
        weights = {name: block.layers[name].get_parameter("weight") for name in group.layers}
        judged = _judge(block, group, seen, kept)
        best, least = None, math.inf
        for step in range(self.grid):
            scale = seen.mean.pow(step / self.grid).clamp(min=1e-4)
            scale = scale / (scale.max() * scale.min()).sqrt()
            trial = {name: (self._fake(weight * scale) / scale).to(weight.dtype) for name, weight in weights.items()}
            error = judged(trial)
            if error < least:
                best, least = scale, error
        if best is None:
            raise CheckpointError(
                f"{block.name}.{group.parent}: its outputs are not finite, so no scale can be chosen; load the model "
                "in a dtype that holds its activations (float32 or bfloat16)"
            )
        return best

    def _fake(self, matrix: Tensor) -> Tensor:
        size = self._size(matrix, "the layer")
        return fake_quantize(matrix, *group_range(matrix, size), self.bits, size, SCALES, self.symmetric)

    def _size(self, matrix: Tensor, name: str) -> int:
        return check_group_size(matrix.shape[1], self.group_size, name)


def _judge(block: Block, group: ScaleGroup, seen: Inputs, kept: list[int]) -> Callable[[Mapping[str, Tensor]], float]:
    """weights [O, I] of the group's layers -> the squared error of the parent's outputs with them."""
    layers = {name: block.layers[name] for name in group.layers}
    if group.parent in layers:
        name, weight = group.parent, layers[group.parent].get_parameter("weight")
        tokens = _triangle(torch.cat(seen.samples))
        return lambda trial: float((tokens @ (trial[name] - weight).float().mT).square().sum())
    expected = _outputs(block, group, seen, kept)

    def judged(trial: Mapping[str, Tensor]) -> float:
        with substituted(layers, trial):
            outputs = _outputs(block, group, seen, kept)
        return sum(float((o - e).float().square().sum()) for o, e in zip(outputs, expected, strict=True))

    return judged


def _triangle(tokens: Tensor) -> Tensor:
    """Inputs [..., T, I] in fp32, in I rows at most: a layer errs by |x d|^2 over them, |R d|^2 with R of x = Q R."""
    tokens = tokens.to(torch.float32)
    return torch.linalg.qr(tokens, mode="r").R if tokens.shape[-2] > tokens.shape[-1] else tokens


def _outputs(block: Block, group: ScaleGroup, seen: Inputs, kept: list[int]) -> list[Tensor]:
    """Of the group's parent, for each of the samples that are kept."""
    if group.place == "qkv":
        return [output_of(block, group.parent, index) for index in kept]
    parent: Any = block.module.get_submodule(group.parent)
    return [parent(sample) for sample in seen.samples]


def _kept(block: Block) -> list[int]:
    """Evenly spaced samples of about _SEARCH_TOKENS in all."""
    tokens = sum(hidden.shape[1] for hidden in block.inputs)
    stride = -(-tokens // _SEARCH_TOKENS)
    return list(range(0, len(block.inputs), stride))


def _few(samples: tuple[Tensor, ...]) -> Tensor:
    """About _CLIP_TOKENS tokens [T, I], evenly spaced."""
    tokens = torch.cat(samples)
    return tokens[:: -(-len(tokens) // _CLIP_TOKENS)].clone()
