"""Law 10: QuantizedLinear is F.linear(x, dequantize(w)); and both are the fp32 formula."""

import pytest
import torch
from torch.nn import functional as F

from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_kernels.reference import quantized_linear


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(5, 48, 16), (33, 96, -1), (1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear(bits, symmetric, outputs, inputs, group, dtype):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    bias = torch.randn(outputs, generator=generator).to(dtype)
    x = torch.randn(2, 3, inputs, generator=generator).to(dtype)
    quantized = quantize_rtn(weight, bits, group, symmetric)
    layer = QuantizedLinear(quantized, bias)
    assert torch.equal(layer(x), F.linear(x, quantized.dequantize(dtype), bias))
    formula = quantized_linear(x, quantized.unpacked(), quantized.scales, quantized.zeros, quantized.group_size, bias)
    exact = F.linear(x.double(), quantized.dequantize(torch.float32).double(), bias.double())
    torch.testing.assert_close(formula.double(), exact, rtol=1e-5, atol=1e-5)
