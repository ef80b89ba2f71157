"""OmniQuant, for weights: where each group is clipped and how channels are scaled is learned, block by block.

    clipping (LWC):       high = sigmoid(g) max(w),  low = sigmoid(b) min(w)         of each group; g = b = 4 at first
    transformation (LET): Q(W diag(s)) diag(1/s), s = exp(t)                         of each place (scale_groups.py)
    loss:                 |block_Q(x_Q) - block(x)|^2  [+ |block_Q(x_Q) - block(x_Q)|^2, the second target]

x are the full-precision model's hidden states, x_Q those of the model as quantized so far. AdamW, one sample a step, in
fp32; the best epoch is kept, by the loss over all samples. Then s is folded away and the ranges become codes.
As in the paper nothing is learned for the second linear layer of the MLP. Left out of LET, because only quantized
activations feel them: the scale between q and k (a matrix's rows do not share a grid), and all shifts. Two things
differ from the authors' code: s is learned by its logarithm, so that it stays positive, and it starts at the better of
1 and SmoothQuant's max|x|^(1/2) / max|w|^(1/2).
Source: Shao et al. 2023, sections 3.1 to 3.3; OmniQuant's quantize/omniquant.py and its weight-only scripts.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from intactkv_eval.cell.spec import SymmetricFormula
from intactkv_eval.errors import ConfigError, UnsupportedModelError
from intactkv_eval.model.families import ScaleGroup
from intactkv_eval.quantize.method import Block, check_settings, install
from intactkv_eval.quantize.rtn import fake_quantize, group_range, quantize_in_range
from intactkv_eval.quantize.scale_groups import fold, scale_groups
from intactkv_eval.quantize.trial import in_float32, inputs_of, substituted
from intactkv_eval.weights.quantized import QuantizedWeight, check_group_size

SCALES = torch.float16  # as all formats hold them
_FIRST_STRENGTH = 4.0


class _Learned(NamedTuple):
    """strengths: b and g (of low, of high) [2, O, G] by layer. scales: t [I], the logarithm of s, by place."""

    strengths: dict[str, Tensor]
    scales: dict[ScaleGroup, Tensor]

    def tensors(self) -> list[Tensor]:
        """All of them, in a fixed order."""
        return [*self.strengths.values(), *self.scales.values()]

    def copy(self) -> "_Learned":
        """As they are now, without gradient."""
        strengths = {name: tensor.detach().clone() for name, tensor in self.strengths.items()}
        return _Learned(strengths, {group: tensor.detach().clone() for group, tensor in self.scales.items()})


@dataclass(frozen=True)
class OmniQuant:
    """The training of Shao et al. for weights alone; the learning rates are those of AdamW, per step.

    lwc, let: which of the two is learned. second_target: the authors' aug_loss. seed: of the order of the samples.
    Raises ConfigError for what is no setting.
    """

    bits: int
    group_size: int
    symmetric: SymmetricFormula | None = None
    epochs: int = 20
    lwc: bool = True
    let: bool = True
    lwc_lr: float = 1e-2
    let_lr: float = 5e-3
    second_target: bool = True
    seed: int = 0
    wants_full_inputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.bits, self.group_size)
        if self.epochs < 1:
            raise ConfigError(f"omniquant: epochs={self.epochs}: use 1 or more (20 in the paper)")
        if not (self.lwc or self.let):
            raise ConfigError("omniquant: lwc and let are both off, so nothing is learned: use rtn for that")
        for name in ("lwc_lr", "let_lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"omniquant: {name}={getattr(self, name)}: use a number above 0")

    def quantize(self, block: Block) -> dict[str, QuantizedWeight]:
        """See Method. Raises UnsupportedModelError where no places for scales are known, ConfigError for a group_size
        that does not fit, where full_inputs are missing, and where the loss is not finite."""
        if block.full_inputs is None:
            raise ConfigError(f"omniquant: {block.name} comes without the full-precision model's inputs")
        groups = [group for group in scale_groups(block) if group.place != "mlp output"] if self.let else []
        for name, layer in block.layers.items():
            if not isinstance(layer, nn.Linear):
                raise UnsupportedModelError(
                    f"omniquant: {block.name}.{name} is a {type(layer).__name__}, not an nn.Linear"
                )
            check_group_size(layer.in_features, self.group_size, f"{block.name}.{name}")
        with in_float32(block.module):
            wide = replace(block, run=lambda hidden, index: block.run(_wide(hidden), index))
            targets = self._targets(wide, block.full_inputs)
            learned = self._train(wide, targets, self._first(wide, targets, groups))
        matrices = fold(block, [(group, scale.exp()) for group, scale in learned.scales.items()])
        found = {}
        for name, matrix in matrices.items():
            limits = self._range(matrix, learned.strengths.get(name))
            full_name = f"{block.name}.{name}"
            found[name] = quantize_in_range(
                matrix, limits, self.bits, self.group_size, SCALES, self.symmetric, full_name
            )
        install(block, found)
        return found

    @torch.no_grad()
    def _targets(self, block: Block, full_inputs: Sequence[Tensor]) -> list[Tensor]:
        """What the output of each sample should be. Two targets make the same gradient as twice that of their mean."""
        targets = []
        for index, (hidden, full) in enumerate(zip(block.inputs, full_inputs, strict=True)):
            target = block.run(full, index)
            targets.append((target + block.run(hidden, index)) / 2 if self.second_target else target)
        return targets

    def _first(self, block: Block, targets: list[Tensor], groups: list[ScaleGroup]) -> _Learned:
        strengths = {}
        for name, layer in block.layers.items() if self.lwc else ():
            low, _ = group_range(layer.get_parameter("weight").detach(), self._size(layer))
            strengths[name] = torch.full((2, *low.shape), _FIRST_STRENGTH, device=low.device)
        plain = _Learned(strengths, {})
        if not groups:
            return plain
        smooth = _Learned(strengths, {group: _smoothing(block, group).log() for group in groups})
        plain = _Learned(strengths, {group: torch.zeros_like(scale) for group, scale in smooth.scales.items()})
        return min((plain, smooth), key=lambda learned: self._total(block, targets, learned))

    def _train(self, block: Block, targets: list[Tensor], learned: _Learned) -> _Learned:
        tensors = [tensor.requires_grad_() for tensor in learned.tensors()]
        optimizer = torch.optim.AdamW(
            [
                {"params": list(learned.strengths.values()), "lr": self.lwc_lr},
                {"params": list(learned.scales.values()), "lr": self.let_lr},
            ],
            weight_decay=0.0,
        )
        order = torch.Generator().manual_seed(self.seed)
        best, least = learned.copy(), self._checked(block, targets, learned, 0)
        for epoch in range(self.epochs):
            for index in torch.randperm(len(targets), generator=order).tolist():
                with torch.enable_grad(), substituted(block.layers, self._weights(block, learned)):
                    error = (block.run(block.inputs[index], index) - targets[index]).square().mean()
                    gradients = torch.autograd.grad(error, tensors)
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    tensor.grad = gradient
                optimizer.step()
            total = self._checked(block, targets, learned, epoch + 1)
            if total < least:
                best, least = learned.copy(), total
        return best

    def _checked(self, block: Block, targets: list[Tensor], learned: _Learned, epoch: int) -> float:
        total = self._total(block, targets, learned)
        if not math.isfinite(total):
            raise ConfigError(
                f"omniquant: the loss in {block.name} is {total} after {epoch} epochs: "
                + ("lower lwc_lr and let_lr" if epoch else "its activations are not finite; load the model in float32")
            )
        return total

    @torch.no_grad()
    def _total(self, block: Block, targets: list[Tensor], learned: _Learned) -> float:
        """The loss, summed over all samples."""
        with substituted(block.layers, self._weights(block, learned)):
            runs = (block.run(hidden, index) for index, hidden in enumerate(block.inputs))
            return sum(float((run - target).square().mean()) for run, target in zip(runs, targets, strict=True))

    def _weights(self, block: Block, learned: _Learned) -> dict[str, Tensor]:
        """Q(W diag(s)) diag(1/s) of every layer: the block's function stays in its own basis while it is trained."""
        scales = {name: scale.exp() for group, scale in learned.scales.items() for name in group.layers}
        found = {}
        for name, layer in block.layers.items():
            weight = layer.get_parameter("weight").detach()
            scaled = weight * scales[name] if name in scales else weight
            low, high = self._range(scaled, learned.strengths.get(name))
            size = self._size(layer)
            rounded = fake_quantize(scaled, low, high, self.bits, size, SCALES, self.symmetric)
            found[name] = (rounded / scales[name] if name in scales else rounded).to(weight.dtype)
        return found

    def _range(self, matrix: Tensor, strengths: Tensor | None) -> tuple[Tensor, Tensor]:
        low, high = group_range(matrix, check_group_size(matrix.shape[1], self.group_size))
        if strengths is None:
            return low, high
        shares = strengths.sigmoid()
        return low * shares[0], high * shares[1]

    def _size(self, layer: nn.Module) -> int:
        return check_group_size(layer.get_parameter("weight").shape[1], self.group_size)


def _smoothing(block: Block, group: ScaleGroup) -> Tensor:
    """SmoothQuant's scale [I] with its alpha of a half, spread evenly around 1."""
    greatest = inputs_of(block, group.layers[0], ()).greatest.clamp(min=1e-5)
    weights = [block.layers[name].get_parameter("weight").detach() for name in group.layers]
    columns = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0).float().clamp(min=1e-5)
    scale = (greatest / columns).sqrt()
    return scale / (scale.max() * scale.min()).sqrt()


def _wide(hidden: Tensor) -> Tensor:
    return hidden.to(torch.promote_types(hidden.dtype, torch.float32))
