"""The plainest backend: the weight is dequantized once, then torch's own matrix product. Any device, any dtype.

It takes the memory of the full-precision model; the codes are kept beside the matrix.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intactkv_kernels.parts import Parts


class DenseLinear(nn.Module):
    """y = F.linear(x, dequantize(weight), bias), the dequantized matrix held in `dtype`."""

    dense: Tensor

    def __init__(self, parts: Parts, dtype: torch.dtype) -> None:
        super().__init__()
        for name, tensor in parts.tensors().items():
            self.register_buffer(name, tensor)
        self.register_buffer("dense", parts.dequantize(parts.tensors(), dtype), persistent=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., I] -> y [..., O]."""
        return F.linear(x, self.dense, bias)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I]; in another dtype than the layer's own it has been rounded to that first."""
        return self.dense.to(dtype)

    def tensors(self) -> dict[str, Tensor]:
        """Packed codes, scales, zeros, and order where there is one."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None and name != "dense"}
