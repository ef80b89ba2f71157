"""QuantizedLinear: torch.nn.Linear whose matrix is a QuantizedWeight.

    y = F.linear(x, dequantize(weight), bias)

The packed codes, scales and zeros are its buffers, so that a state dict holds what a checkpoint holds; the dense
backend keeps the dequantized matrix beside them. Knows nothing of models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intactkv_eval.weights.quantized import QuantizedWeight
from intactkv_kernels.dispatch import choose_backend


class QuantizedLinear(nn.Module):
    """A linear layer [I] -> [O] on a quantized matrix.

    `compute_dtype` is the dtype of the activations, which the dense matrix is dequantized into.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    dense: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        compute_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.bits, self.group_size = weight.bits, weight.group_size
        self.backend = choose_backend(backend)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zeros", weight.zeros)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        dtype = compute_dtype or weight.scales.dtype
        self.register_buffer("dense", weight.dequantize(dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The dequantized matrix [O, I]: model code asks a linear layer for its weight's dtype and device."""
        return self.dense

    def quantized_weight(self) -> QuantizedWeight:
        """The matrix as a value (shares storage with this layer)."""
        return QuantizedWeight(self.codes, self.scales, self.zeros, self.bits, self.group_size, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        return F.linear(x, self.dense, self.bias)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, backend={self.backend}"
        )
