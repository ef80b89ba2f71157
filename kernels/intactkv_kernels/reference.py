"""The formula in fp32, which every kernel is measured against.

y[..., o] = sum_i x[..., i] * (codes[o, i] - zeros[o, g(i)]) * scales[o, g(i)] + bias[o],    g(i) = i // group_size
"""

import torch
from torch import Tensor


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int, bias: Tensor | None = None
) -> Tensor:
    """x [..., I] times a quantized weight: unpacked codes [O, I], scales and zeros [O, G]; y [..., O] in fp32.

    No word of packing here: the reference must stay readable at a glance.
    """
    group = torch.arange(codes.shape[1], device=codes.device) // group_size
    weight = (codes.float() - zeros.float()[:, group]) * scales.float()[:, group]
    product = x.float() @ weight.t()
    return product if bias is None else product + bias.float()
