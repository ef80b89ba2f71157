"""RTN against its formula, and against other hands' implementations of it."""

import pytest
import torch
from torch.ao.quantization.observer import PerChannelMinMaxObserver

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.quantized import QuantizedWeight


@pytest.fixture
def weight():
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [None, "gptq", "quarot", "omniquant", "awq"])
def test_error_is_at_most_half_a_step(weight, bits, symmetric):
    quantized = quantize_rtn(weight, bits, 16, symmetric)
    error = (quantized.dequantize() - weight).abs().view(12, -1, 16).amax(-1)
    # GPTQ's symmetric grid has one code less above zero than the range needs: its largest value may be a step away.
    assert (error <= quantized.scales * (1.0001 if symmetric == "gptq" else 0.5001)).all()
    assert int(quantized.unpacked().max()) < 2**bits


def test_asymmetric_is_torchs_observer(weight):
    """Per channel in 8 bits torch's own min/max observer gives the same scale and zero."""
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=torch.quint8, qscheme=torch.per_channel_affine)
    observer(weight)
    scales, zeros = observer.calculate_qparams()
    quantized = quantize_rtn(weight, 8, -1)
    torch.testing.assert_close(quantized.scales[:, 0], scales)
    assert torch.equal(quantized.zeros[:, 0].int(), zeros.int())
    expected = torch.fake_quantize_per_channel_affine(weight, scales, zeros.int(), 0, 0, 255)
    torch.testing.assert_close(quantized.dequantize(), expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_groups_come_back(value):
    weight = torch.full((2, 32), value)
    torch.testing.assert_close(quantize_rtn(weight, 4, 16).dequantize(), weight)


def test_zero_has_a_code_in_every_group():
    weight = torch.rand(4, 32) + 5
    weight[:, 0] = 0
    assert (quantize_rtn(weight, 3, 32).dequantize()[:, 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_stored_in_the_weights_dtype(weight, dtype):
    quantized = quantize_rtn(weight.to(dtype), 4, 16)
    assert quantized.scales.dtype == dtype
    tiny = quantize_rtn(torch.full((1, 16), 1e-7).to(dtype), 4, 16)
    assert torch.isfinite(tiny.dequantize()).all()


@pytest.mark.parametrize(("bits", "group", "said"), [(5, 16, "bits=5"), (4, 48, "16, 32, 64"), (4, 0, "group_size=0")])
def test_refused(weight, bits, group, said):
    with pytest.raises(ConfigError, match=said):
        quantize_rtn(weight, bits, group, layer="model.layers.0.mlp.up_proj")


def test_shapes_that_do_not_fit_are_refused(weight):
    good = quantize_rtn(weight, 4, 16)
    with pytest.raises(CheckpointError, match="scales"):
        QuantizedWeight(good.codes, good.scales[:, :1], good.zeros, 4, 16, 64)


def test_dequantization_rounds_once(weight):
    """Exact in fp32, then one rounding: the same as multiplying in the 16-bit dtype."""
    quantized = quantize_rtn(weight.half(), 4, 16)
    whole = (quantized.unpacked().view(12, 4, 16).half() - quantized.zeros[..., None].half()) * quantized.scales[
        ..., None
    ]
    assert torch.equal(quantized.dequantize(), whole.view(12, 64))
