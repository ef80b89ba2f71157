"""QuantizedLinear: torch.nn.Linear whose matrix is a QuantizedWeight.

    y = F.linear(prepare(x), dequantize(weight), bias)

`prepare` is an input stage (activations.py), where there is one. How the product is computed is the backend's
(intactkv_kernels), which holds the weight in the form that it wants. Knows nothing of models.
"""

import hashlib
from typing import Any, cast

import torch
from torch import Tensor, nn

from intactkv_eval.compat.tensor_parts import is_wrapper, weight_hash
from intactkv_eval.errors import ConfigError
from intactkv_eval.model.activation_quant import InputStage
from intactkv_eval.weights.formats import gptq
from intactkv_eval.weights.quantized import QuantizedWeight
from intactkv_kernels.dispatch import BackendLayer, build_layer, choose_backend
from intactkv_kernels.packing import unpack
from intactkv_kernels.parts import Parts


class QuantizedLinear(nn.Module):
    """A linear layer [I] -> [O] on a quantized matrix.

    `compute_dtype` is the dtype of the activations; `prepare` is applied to them before the product.
    Raises ConfigError where a named backend cannot run the layer.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
        name: str = "the layer",
        prepare: InputStage | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size, self.digest = weight.bits, weight.group_size, weight.digest()
        self.is_ordered = weight.order is not None
        self.compute_dtype = compute_dtype or weight.scales.dtype
        parts = _parts_of(weight)
        try:
            self.backend = choose_backend(backend, parts, self.compute_dtype)
            self.kernel = build_layer(self.backend, parts, self.compute_dtype)
        except (ValueError, NotImplementedError) as error:
            raise ConfigError(f"{name}: {error}") from None
        self._run = self.kernel.forward  # no hooks inside: a module's own call costs as much as a small product
        self.prepare = prepare
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix [O, I]: model code asks a linear layer for its weight's dtype and device.

        Made anew each time where the backend keeps the weight packed.
        """
        return cast(BackendLayer, self.kernel).matrix(self.compute_dtype)

    def quantized_weight(self) -> QuantizedWeight:
        """The matrix as a value."""
        return _weight_of(cast(BackendLayer, self.kernel).tensors(), self.bits, self.group_size, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        if self.prepare is not None:
            x = self.prepare(x)
        y: Tensor = self._run(x, self._parameters["bias"])
        return y

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, backend={self.backend}"
        )


def _weight_of(held: dict[str, Tensor], bits: int, group_size: int, width: int) -> QuantizedWeight:
    codes, scales, zeros, order = held["codes"], held["scales"], held["zeros"], held.get("order")
    if codes.dtype is torch.uint8:
        return QuantizedWeight.from_codes(codes, scales, zeros, bits, group_size, order)
    return QuantizedWeight(codes, scales, zeros, bits, group_size, width, order)


def _parts_of(weight: QuantizedWeight) -> Parts:
    bits, size, width = weight.bits, weight.group_size, weight.in_features
    return Parts(
        weight.codes, weight.scales, weight.zeros, weight.order, bits, size, width,
        unpack=lambda words: unpack(words, bits, width),
        dequantize=lambda held, dtype: _weight_of(held, bits, size, width).dequantize(dtype),
        gptq=lambda less_one: gptq.write(weight, less_one),
    )  # fmt: skip


def backends_of(model: nn.Module) -> dict[str, int]:
    """How many quantized layers each backend runs."""
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            counts[module.backend] = counts.get(module.backend, 0) + 1
    return dict(sorted(counts.items()))


def quantized_digest(model: nn.Module) -> str:
    """What tells one quantized model from another: every packed matrix and every input stage, by the layers' names.

    Of layers that another package has quantized (torchao, bitsandbytes) it is the tensors that hold their codes.
    """
    made = hashlib.sha256()
    ours: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            ours.add(name)
            made.update(f"{name} {module.digest}\n".encode())
        elif hasattr(module, "in_features") and not any(name.startswith(f"{own}.") for own in ours):
            held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if any(is_wrapper(tensor) or not tensor.is_floating_point() for _, tensor in held):
                made.update(f"{name} {weight_hash(held)}\n".encode())
        if isinstance(module, InputStage):
            made.update(f"{name} {module.spec!r}\n".encode())
    return made.hexdigest()[:32]


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """The quantized layers of a model, by full name, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
