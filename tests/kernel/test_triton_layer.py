"""QuantizedLinear on the Triton backend, in Triton's interpreter on a CPU and on a GPU where there is one."""

import os

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from helpers.tolerances import RELATIVE_RMS, relative_rms
from torch.nn import functional as F

from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.quantized import QuantizedWeight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


@pytest.fixture
def weight():
    torch.manual_seed(0)
    made = quantize_rtn(torch.randn(48, 96).to(torch.float16), 3, 32)
    order = torch.randperm(96).to(torch.int32)
    return QuantizedWeight.from_codes(made.unpacked(), made.scales, made.zeros, 3, 32, order).to(DEVICE)


def test_layer(weight):
    bias = torch.randn(48, device=DEVICE).to(torch.float16)
    layer = QuantizedLinear(weight, bias, backend="triton")
    exact = weight.dequantize(torch.float64)
    for rows in (1, 20):
        x = torch.randn(2, rows, 96, device=DEVICE).to(torch.float16)
        y = layer(x)
        assert y.shape == (2, rows, 48)
        assert relative_rms(y, F.linear(x.double(), exact, bias.double())) < RELATIVE_RMS[torch.float16]
    assert torch.equal(layer.weight, weight.dequantize(torch.float16))
    assert torch.equal(layer.quantized_weight().codes, weight.codes)


def test_gradient_of_x(weight):
    x = torch.randn(3, 96, device=DEVICE).to(torch.float16).requires_grad_()
    QuantizedLinear(weight, backend="triton")(x).float().square().sum().backward()
    found, x.grad = x.grad, None
    F.linear(x, weight.dequantize(torch.float16)).float().square().sum().backward()
    assert relative_rms(found, x.grad) < 5 * RELATIVE_RMS[torch.float16]  # y is rounded on the way, twice


def test_compiled_and_eager_are_the_same(weight):
    layer = QuantizedLinear(weight, backend="triton")
    x = torch.randn(2, 5, 96, device=DEVICE).to(torch.float16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
