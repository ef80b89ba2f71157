"""The basis of V in packed checkpoints: recovered from the checkpoint against the full-precision model, and applied.

AWQ folds scales into the weights without changing the model's function: s into the norm before q, k and v (their
inputs are divided, their columns multiplied by it), and t between v_proj and o_proj where these have equal shapes,
which divides V by t. K is unchanged. So, with W the full-precision v_proj and Q the dequantized one,

    s = norm_full / norm_checkpoint (exactly)        Q[o] ~ ratio[o] * (W * s)[o],   ratio = 1 / t, by least squares
    V in the checkpoint's basis = ratio * V          residual = |Q - ratio * (W * s)| / |Q|

QuaRot fuses a Hadamard transform of head_dim into v_proj, head by head, which is known exactly: V turns with it.

v_proj stands for whatever rows of a matrix make V. A channel that the norm stops (a weight of 0) is left out. The
residual is the quantization error where the checkpoint is of this model, and about 1 where it is not. Where nothing can
have been scaled the ratio is 1: least squares would only add its own error.
Source: llm-awq and AutoAWQ, their scaling of layers (apply_scale); METHOD of the paper: V is captured after it.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.weights.hadamard import hadamard_rows

ROTATED = "hadamard"
"""The basis of a PivotKV whose values are transformed per head, as in a model that QuaRot rotated."""

# Rounding alone leaves 0.1 (4 bits), 0.25 (3 bits), 0.6 (2 bits, per channel); weights of another model 1 or more.
WORST_RESIDUAL = 0.9
_ROUNDING = 2**-7  # of a norm's weights, stored in 16 bits by the one or the other
_NOTHING = 2**-24  # of a norm's weights: such channels are pruned, or fp16 has made them 0
_LEAST = torch.finfo(torch.float64).tiny
_NOISE = 0.02  # of the median of ratios that are all 1
_SCALED = 0.3  # beyond it the median of ratios is no rounding's, not even at 2 bits


class LayerBasis(NamedTuple):
    """One layer: the factor of each of V's channels [H*D], and what of the weights it does not explain."""

    ratio: Tensor
    residual: float


def recover(quantized: Tensor, full: Tensor, norm_full: Tensor, norm_quantized: Tensor, folded: bool) -> LayerBasis:
    """The basis of V in one layer: dequantized and full-precision v_proj [H*D, I], the weights [I] of the norm before.

    `folded`: the format may scale V, and v_proj and o_proj have equal shapes, which is where AWQ does it. Raises
    PivotError where V is scaled although it should not be.
    """
    one, other = norm_full.double(), norm_quantized.double()
    live = torch.minimum(one.abs(), other.abs()) > _NOTHING
    if bool((torch.maximum(one.abs(), other.abs())[~live] > _ROUNDING).any()):
        return LayerBasis(torch.ones(len(full)), float("inf"))  # a norm stops what the other one lets through
    # A channel that both norms stop reaches no output, whatever stands in its column.
    scale = torch.where(live, one / torch.where(live, other, 1), 1)
    scaled, found = full.double() * scale * live, quantized.double() * live
    energy = scaled.square().sum(dim=1)
    ratio = torch.where(energy > 0, (found * scaled).sum(dim=1) / energy.clamp(min=_LEAST), 1)
    away = float((ratio - 1).abs().median())
    untouched = bool((scale - 1).abs().max() < _ROUNDING) and away < _NOISE
    unlike = (found - ratio[:, None] * scaled).norm()
    residual = float(unlike / found.norm().clamp(min=_LEAST)) if bool(unlike) else 0.0
    if not folded and away > _SCALED and residual < WORST_RESIDUAL:
        raise PivotError(
            f"v_proj is scaled by {float(ratio.median()):.2f} against the reference where no known writer scales it: "
            "the pivot's values cannot be brought into its basis"
        )
    if not folded or untouched:
        ratio = torch.ones_like(ratio)
    return LayerBasis(ratio, residual if math.isfinite(residual) else float("inf"))


def check_residuals(layers: Sequence[LayerBasis], checkpoint: str, reference: str) -> float:
    """The worst residual. Raises PivotError, with the figure, where it says that the models are not the same."""
    worst = max(range(len(layers)), key=lambda index: layers[index].residual)
    if not layers[worst].residual < WORST_RESIDUAL:
        raise PivotError(
            f"{checkpoint} is not made from reference={reference}: v_proj of layer {worst} differs from the "
            f"reference's by {layers[worst].residual:.2f} of its size (a rounded copy: below {WORST_RESIDUAL}). Name "
            "the full-precision model that was quantized"
        )
    return layers[worst].residual


def to_basis(pivot: PivotKV, ratios: Sequence[Tensor]) -> PivotKV:
    """`pivot` with V multiplied by each layer's ratio [H*D]; keys and logits are those of the model in any basis.

    Raises PivotError where the numbers of layers or channels differ.
    """
    if len(ratios) != len(pivot.values):
        raise PivotError(f"{len(ratios)} layers of scales for a PivotKV of {len(pivot.values)} layers")
    for layer, (value, ratio) in enumerate(zip(pivot.values, ratios, strict=True)):
        heads, _, width = value.shape
        if ratio.numel() != heads * width:
            raise PivotError(f"layer {layer}: {ratio.numel()} scales for {heads} heads of {width} values")
    if all(bool((ratio == 1).all()) for ratio in ratios):
        return pivot

    def scaled(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factors = [ratio.view(len(value), 1, -1).to(value.device) for value, ratio in zip(values, ratios, strict=True)]
        pairs = zip(values, factors, strict=True)
        return tuple((value.double() * factor.double()).to(value.dtype) for value, factor in pairs)

    digest = hashlib.sha256(torch.cat([ratio.half().cpu() for ratio in ratios]).numpy().tobytes()).hexdigest()
    return pivot.with_values(scaled, f"awq:{digest[:16]}")


def to_rotated(pivot: PivotKV) -> PivotKV:
    """`pivot` in the basis of the rotated model: V [H, P, D] behind a Hadamard transform of D, rounded once.

    Keys and logits are those of the model in any basis. Raises PivotError where V is not in the plain basis.
    """
    pivot.check_matches(basis="plain")

    def turned(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(hadamard_rows(value.double()).to(value.dtype) for value in values)

    return pivot.with_values(turned, ROTATED)
