"""Quantized activations, simulated: the input of a linear layer, given back as it would be held in few bits.

    symmetric:  s = max|x| / (2**(b-1) - 1),                  x' = s clamp(round(x / s), -2**(b-1), 2**(b-1) - 1)
    asymmetric: s = (max(x, 0) - min(x, 0)) / (2**b - 1),     z = round(-min(x, 0) / s),
                x' = s (clamp(round(x / s) + z, 0, 2**b - 1) - z)

Both ends of the range are multiplied by `clip` first. The range is each token's own (scheme `token`, dynamic) or one
that was calibrated for the layer (`tensor`, static). All is computed in floating point: nothing is saved or faster.
Numbers that are not finite come out as NaN: a static range must not hide them.
`InputStage` is what stands in front of a layer's product, a value that is handed to the layer; no hooks.
Source: QuaRot, quant_utils.py of its code (ActQuantizer).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intactkv_eval.cell.spec import ActivationSpec
from intactkv_eval.compat.transformers_api import Conv1D
from intactkv_eval.errors import ConfigError
from intactkv_eval.weights.gradient import straight_through
from intactkv_eval.weights.hadamard import hadamard_rows
from intactkv_eval.weights.input_transform import InputTransform


def quantize_activations(
    x: Tensor, spec: ActivationSpec, range: tuple[Tensor | float, Tensor | float] | None = None
) -> Tensor:
    """x [..., I] as `spec` would hold it, same dtype; `range` is the lowest and highest number of scheme `tensor`.

    Computed in fp32. Raises ConfigError where that scheme has no range, or the other has one.
    """
    if spec.bits == 16:
        return x
    if (spec.scheme == "tensor") != (range is not None):
        raise ConfigError(f"activations of scheme {spec.scheme}: a calibrated range belongs to scheme tensor alone")
    values = x.to(torch.float32)
    found = (values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)) if range is None else range
    low, high = (torch.as_tensor(end, dtype=torch.float32, device=x.device) * spec.clip for end in found)
    smallest = torch.finfo(torch.float32).tiny  # a row of zeros has no spread
    values = values + (values - values)  # 0, or NaN where a number is not finite
    if spec.symmetric:
        top = 2 ** (spec.bits - 1) - 1
        step = (torch.maximum(-low, high).clamp(min=0) / top).clamp(min=smallest)
        return torch.round(values / step).clamp(-top - 1, top).mul(step).to(x.dtype)
    top = 2**spec.bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = ((high - low) / top).clamp(min=smallest)
    zero = torch.round(-low / step)
    return (torch.round(values / step) + zero).clamp(0, top).sub(zero).mul(step).to(x.dtype)


class InputStage(nn.Module):
    """x [..., I] -> what the layer's product takes: an online Hadamard transform, then the activation quantizer.

    The gradient passes through the rounding as if it were not there. Raises ConfigError for a static quantizer that
    has no range, or one that is not finite and in order.
    """

    range: Tensor | None

    def __init__(self, spec: InputTransform, name: str = "the layer") -> None:
        super().__init__()
        self.spec, self.quantizes = spec, spec.activations.bits < 16
        held = None
        if self.quantizes and spec.activations.scheme == "tensor":
            held = torch.tensor(spec.range or (), dtype=torch.float32)
            if held.shape != (2,) or not torch.isfinite(held).all() or held[0] > held[1]:
                raise ConfigError(f"{name}: a static range of activations needs its two ends, has {spec.range}")
        self.register_buffer("range", held, persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        """x behind the transform, not quantized: what calibration looks at."""
        return x if self.spec.across is None else hadamard_rows(x, self.spec.across)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype."""
        x = self.rotated(x)
        if not self.quantizes:
            return x
        return straight_through(x, self.quantized(x.detach()))

    def quantized(self, x: Tensor) -> Tensor:
        """x through the quantizer alone."""
        ends = None if self.range is None else (self.range[0], self.range[1])
        return quantize_activations(x, self.spec.activations, ends)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"across={self.spec.across}, {self.spec.activations!r}"


class StagedLinear(nn.Module):
    """A full-precision linear layer behind an input stage. Its matrix [O, I] and bias are `layer`'s own, not copies.

    (GPT-2's Conv1D keeps its transpose: there the matrix is a view.)
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: "nn.Linear | Conv1D | StagedLinear", prepare: InputStage) -> None:
        super().__init__()
        matrix, bias = layer.weight.detach(), layer.bias
        self.weight = nn.Parameter(matrix.t() if isinstance(layer, Conv1D) else matrix, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.out_features, self.in_features = int(self.weight.shape[0]), int(self.weight.shape[1])
        self.prepare = prepare

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        return F.linear(self.prepare(x), self.weight, self.bias)


@contextmanager
def activations_off(model: nn.Module) -> Iterator[None]:
    """While it lasts no input stage of `model` quantizes; transforms go on, or a rotated model would not be itself."""
    stages = [module for module in model.modules() if isinstance(module, InputStage) and module.quantizes]
    for stage in stages:
        stage.quantizes = False
    try:
        yield
    finally:
        for stage in stages:
            stage.quantizes = True
