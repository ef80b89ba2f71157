"""The basis of V in packed checkpoints: recovered from the checkpoint against the full-precision model, and applied.

AWQ folds scales into the weights without changing the model's function: s into the norm before q, k and v (their
inputs are divided, their columns multiplied by it), and t between v_proj and o_proj where these have equal shapes,
which divides V by t. K is unchanged. So, with W the full-precision v_proj and Q the dequantized one,

    s = norm_full / norm_checkpoint (exactly)        Q[o] ~ ratio[o] * (W * s)[o],   ratio = 1 / t, by least squares
    V in the checkpoint's basis = ratio * V          residual = |Q - ratio * (W * s)| / |Q|

The residual is the quantization error where the checkpoint is of this model, and about 1 where it is not.
Source: llm-awq and AutoAWQ, their scaling of layers (apply_scale); METHOD of the paper: V is captured after it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.kv import PivotKV

# Rounding alone leaves 0.1 (4 bits) to 0.3 (3 bits, small groups clipped); weights of another model about 1.
WORST_RESIDUAL = 0.5
# Least squares over a row of hundreds of rounded weights is right to well under this.
_NOISE = 0.05
_ROUNDING = 2**-7  # of a norm's weights, stored in 16 bits by the one or the other


class LayerBasis(NamedTuple):
    """One layer: the factor of each of V's channels [H*D], and what of the weights it does not explain."""

    ratio: Tensor
    residual: float


def recover(quantized: Tensor, full: Tensor, norm_full: Tensor, norm_quantized: Tensor, folded: bool) -> LayerBasis:
    """The basis of V in one layer: dequantized and full-precision v_proj [H*D, I], the weights [I] of the norm before.

    `folded`: v_proj and o_proj have equal shapes, so AWQ scales between them. A ratio that is 1 but for noise is taken
    for 1 where nothing else was scaled: least squares would only add its own error.
    """
    scale = norm_full.double() / norm_quantized.double()
    untouched = not folded or bool((scale - 1).abs().max() < _ROUNDING)
    scaled, found = full.double() * scale, quantized.double()
    energy = scaled.square().sum(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    ratio = (found * scaled).sum(dim=1) / energy
    if untouched and bool((ratio - 1).abs().max() < _NOISE):
        ratio = torch.ones_like(ratio)
    residual = (found - ratio[:, None] * scaled).norm() / found.norm()
    return LayerBasis(ratio, float(residual) if torch.isfinite(residual) else float("inf"))


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
    values = []
    for layer, (value, ratio) in enumerate(zip(pivot.values, ratios, strict=True)):
        heads, _, width = value.shape
        if ratio.numel() != heads * width:
            raise PivotError(f"layer {layer}: {ratio.numel()} scales for {heads} heads of {width} values")
        factor = ratio.view(heads, 1, width).to(value.device)
        values.append((value.double() * factor.double()).to(value.dtype))
    if all(bool((ratio == 1).all()) for ratio in ratios):
        return pivot
    digest = hashlib.sha256(torch.cat([ratio.double().cpu() for ratio in ratios]).numpy().tobytes()).hexdigest()
    fingerprint = pivot.fingerprint.model_copy(update={"basis": f"awq:{digest[:16]}"})
    return replace(pivot, values=tuple(values), fingerprint=fingerprint)
