"""Law 10: QuantizedLinear is F.linear(x, dequantize(w)), on every backend of this machine; and both are the formula."""

import pytest
import torch
from helpers.tolerances import RELATIVE_RMS, relative_rms
from torch.nn import functional as F

from intactkv_eval.errors import ConfigError
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.quantized import QuantizedWeight
from intactkv_kernels.reference import quantized_linear


def made(bits, outputs, inputs, group, dtype, symmetric=None, order=False):
    generator = torch.Generator().manual_seed(bits)
    weight = quantize_rtn(torch.randn(outputs, inputs, generator=generator).to(dtype), bits, group, symmetric)
    if order:
        permutation = torch.randperm(inputs, generator=generator).to(torch.int32)
        weight = QuantizedWeight.from_codes(
            weight.unpacked(), weight.scales, weight.zeros, bits, weight.group_size, permutation
        )
    return weight, torch.randn(outputs, generator=generator).to(dtype)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [None, "gptq", "quarot"])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(5, 48, 16), (33, 96, -1), (1, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(bits, symmetric, outputs, inputs, group, dtype):
    quantized, bias = made(bits, outputs, inputs, group, dtype, symmetric)
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = QuantizedLinear(quantized, bias, backend="dense")
    assert torch.equal(layer(x), F.linear(x, quantized.dequantize(dtype), bias))
    formula = quantized_linear(x, quantized.unpacked(), quantized.scales, quantized.zeros, quantized.group_size, bias)
    exact = F.linear(x.double(), quantized.dequantize(torch.float32).double(), bias.double())
    torch.testing.assert_close(formula.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), [(70, 192, 64), (33, 96, -1), (17, 64, 32), (300, 128, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu(bits, order, outputs, inputs, group, dtype):
    """Few rows and many, in every dtype; and the weight comes back as it went in."""
    quantized, bias = made(bits, outputs, inputs, group, dtype, order=order)
    layer = QuantizedLinear(quantized, bias, backend="cpu")
    exact = quantized.dequantize(torch.float64)
    for rows in (1, 7, 90):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = F.linear(x.double(), exact, bias.double())
        assert relative_rms(layer(x), expected) < RELATIVE_RMS[dtype]
        assert layer(x).dtype is dtype
    back = layer.quantized_weight()
    assert torch.equal(back.unpacked(), quantized.unpacked())
    assert torch.equal(back.scales, quantized.scales)
    assert torch.equal(back.zeros, quantized.zeros)
    assert torch.equal(layer.weight, quantized.dequantize(dtype))


@pytest.mark.parametrize("backend", ["cpu", "dense"])
def test_gradient_of_x(backend):
    quantized, bias = made(4, 64, 64, 32, torch.float32, order=True)
    x = torch.randn(3, 64, requires_grad=True)
    QuantizedLinear(quantized, bias, backend=backend)(x).square().sum().backward()
    found, x.grad = x.grad, None
    F.linear(x, quantized.dequantize(torch.float32), bias).square().sum().backward()
    assert relative_rms(found, x.grad) < RELATIVE_RMS[torch.float32]


def test_auto_takes_packed_weights_only_where_they_are_faster():
    weight, _ = made(4, 64, 64, 32, torch.bfloat16)
    assert QuantizedLinear(weight).backend == "cpu"
    assert QuantizedLinear(weight, compute_dtype=torch.float32).backend == "dense"
    assert QuantizedLinear(made(4, 64, 48, 16, torch.bfloat16)[0]).backend == "dense"  # no group of the operator fits


@pytest.mark.parametrize(
    ("backend", "group", "message"),
    [
        ("cpu", 16, "no multiple of 32 divides group_size=16"),
        ("triton", 32, "[Tt]riton"),
        ("gptqmodel", 32, "gptqmodel"),
    ],
)
def test_a_backend_that_cannot_run_the_layer_says_why(backend, group, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=rf"up_proj: backend={backend} cannot run it: .*{message}"):
        QuantizedLinear(made(4, 64, 64, group, torch.bfloat16)[0], backend=backend, name="up_proj")


def test_compiled_and_eager_are_the_same():
    """The operator and its shape function: one graph, no break."""
    quantized, bias = made(4, 64, 64, 32, torch.bfloat16, order=True)
    layer = QuantizedLinear(quantized, bias, backend="cpu")
    x = torch.randn(2, 5, 64).to(torch.bfloat16)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert compiled(x).shape == (2, 5, 64)
