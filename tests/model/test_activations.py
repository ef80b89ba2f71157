"""Quantized activations: the formulas, where they stand, and that static ranges are those of what was run."""

import numpy as np
import pytest
import torch
from helpers.tiny import build_model
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from intactkv_eval.cell.spec import ActivationSpec, WeightSpec
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.model.activation_quant import InputStage, StagedLinear, activations_off, quantize_activations
from intactkv_eval.model.input_transforms import (
    apply_input_transforms,
    calibrate_ranges,
    input_transforms,
    transformed_layers,
)
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.input_transform import InputTransform, Rotation

IDS = torch.arange(2, 40)[None]
A4 = ActivationSpec(bits=4, clip=0.9)
A8 = ActivationSpec(bits=8)
STATIC = ActivationSpec(bits=8, scheme="tensor", symmetric=False)


def by_the_paper(row, bits, symmetric, clip, ends=None):
    """One row of numbers, in numpy, a number at a time."""
    low, high = (row.min(), row.max()) if ends is None else ends
    low, high = np.float32(clip) * np.float32(low), np.float32(clip) * np.float32(high)
    out = []
    for number in row:
        if symmetric:
            step = np.float32(max(abs(low), abs(high)) / (2 ** (bits - 1) - 1))
            out.append(step * min(max(np.round(number / step), -(2 ** (bits - 1))), 2 ** (bits - 1) - 1))
        else:
            step = np.float32((max(high, 0) - min(low, 0)) / (2**bits - 1))
            zero = np.round(-min(low, 0) / step)
            out.append(step * (min(max(np.round(number / step) + zero, 0), 2**bits - 1) - zero))
    return np.array(out, np.float32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", ["token", "tensor"])
def test_what_is_not_finite_stays_so(symmetric, value, scheme):
    x = torch.ones(2, 8)
    x[1, 3] = value
    spec = ActivationSpec(bits=8, scheme=scheme, symmetric=symmetric)
    found = quantize_activations(x, spec, (-1.0, 2.0) if scheme == "tensor" else None)
    assert torch.isfinite(found[0]).all()
    assert not torch.isfinite(found[1, 3])


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clip", [1.0, 0.9])
@pytest.mark.parametrize("offset", [0.0, 3.0, -3.0])
def test_formula(bits, symmetric, clip, offset):
    x = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(bits)) + offset
    spec = ActivationSpec(bits=bits, symmetric=symmetric, clip=clip)
    rows = x.view(6, 40).numpy()
    expected = np.stack([by_the_paper(row, bits, symmetric, clip) for row in rows])
    np.testing.assert_allclose(quantize_activations(x, spec).view(6, 40).numpy(), expected, rtol=1e-5, atol=1e-6)
    static = spec.model_copy(update={"scheme": "tensor"})
    expected = np.stack([by_the_paper(row, bits, symmetric, clip, (-2.0, 2.5)) for row in rows])
    np.testing.assert_allclose(
        quantize_activations(x, static, (-2.0, 2.5)).view(6, 40).numpy(), expected, rtol=1e-5, atol=1e-6
    )


def test_tokens_do_not_see_each_other_and_zeros_stay():
    x = torch.randn(1, 5, 32)
    alone = quantize_activations(x, A4)[:, 2:3]
    x[:, :2] *= 100
    x[:, 3] = 0
    together = quantize_activations(x, A4)
    assert torch.equal(together[:, 2:3], alone)
    assert not together[:, 3].any()
    assert quantize_activations(x.bfloat16(), A4).dtype is torch.bfloat16
    assert torch.equal(quantize_activations(x, ActivationSpec()), x)


@pytest.mark.parametrize(("spec", "ends"), [(A8, (0.0, 1.0)), (STATIC, None)])
def test_a_range_belongs_to_static_quantizers(spec, ends):
    with pytest.raises(ConfigError, match="belongs to scheme tensor alone"):
        quantize_activations(torch.ones(2), spec, ends)


@pytest.mark.parametrize("ends", [None, (1.0, -1.0), (0.0, float("nan"))])
def test_a_static_stage_needs_a_range(ends):
    with pytest.raises(ConfigError, match=r"up_proj: a static range"):
        InputStage(InputTransform(None, STATIC, ends), "up_proj")


@pytest.mark.parametrize("backend", ["dense", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_10_with_a_stage(backend, dtype):
    """y = F.linear(quantized(H x), dequantize(w), bias), exactly where the backend's product is torch's."""
    weight = quantize_rtn(torch.randn(24, 96).to(dtype), 4, 32)
    bias, x = torch.randn(24).to(dtype), torch.randn(2, 3, 96).to(dtype)
    stage = InputStage(InputTransform(1, A4))
    prepared = quantize_activations(stage.rotated(x), A4)
    plain = QuantizedLinear(weight, bias, dtype, backend)
    layer = QuantizedLinear(weight, bias, dtype, backend, prepare=stage)
    assert torch.equal(layer(x), plain(prepared))
    if backend == "dense":
        assert torch.equal(layer(x), F.linear(prepared, weight.dequantize(dtype), bias))
    assert not torch.equal(layer(x), plain(x))


def test_the_gradient_passes_through_the_rounding():
    x = torch.randn(3, 64, requires_grad=True)
    layer = StagedLinear(nn.Linear(64, 8), InputStage(InputTransform(None, A4)))
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(dim=0).expand(3, -1))


@pytest.mark.parametrize("weights", [None, WeightSpec(method="rtn", bits=8, group_size=-1)])
def test_every_linear_layers_input_is_quantized(model, weights):
    """W16A8 and W8A8 of all families, against hooks on the plain model that do the same; the source is left alone."""
    specs = input_transforms(list(linear_layers(model)), None, A8)
    made = (
        quantized_model(model, None, stages=specs) if weights is None else quantize_model(model, weights, stages=specs)
    )
    base = model if weights is None else quantize_model(model, weights)
    layers = [module for module in base.modules() if type(module) in {nn.Linear, Conv1D, QuantizedLinear}]
    layers = [layer for layer in layers if layer is not base.get_output_embeddings()]
    assert len(layers) == len(specs)
    with torch.no_grad():
        before = base(IDS).logits
        hooks = [layer.register_forward_pre_hook(lambda _, x: quantize_activations(x[0], A8)) for layer in layers]
        expected = base(IDS).logits
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(made(IDS).logits, expected, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-3)
        with activations_off(made):
            torch.testing.assert_close(made(IDS).logits, before)
        assert torch.equal(base(IDS).logits, before)


def test_stages_are_put_on_and_taken_off(llama):
    with torch.no_grad():
        before = llama(IDS).logits
        apply_input_transforms(llama, None, A4)
        coarse = llama(IDS).logits
        apply_input_transforms(llama, None, ActivationSpec())
        assert torch.equal(llama(IDS).logits, before)
        assert not torch.equal(coarse, before)
        made = quantize_model(llama, WeightSpec(method="rtn", bits=8, group_size=-1))
        plain = made(IDS).logits
        apply_input_transforms(made, None, A4)
        assert not torch.equal(made(IDS).logits, plain)
        apply_input_transforms(made, None, ActivationSpec())
        assert torch.equal(made(IDS).logits, plain)


def test_quantizing_a_staged_model_keeps_its_stages(llama):
    apply_input_transforms(llama, None, A4)
    made = quantize_model(llama, WeightSpec(method="rtn", bits=8, group_size=-1))
    assert all(layer.prepare.spec == InputTransform(None, A4) for layer in transformed_layers(made).values())


def test_calibrated_ranges_are_those_of_what_was_run(llama):
    """By hooks of the test's own; and the model is left without any."""
    seen = {}
    for name, layer in linear_layers(llama).items():
        layer.register_forward_pre_hook(
            lambda _, x, name=name: seen.setdefault(name, []).extend([x[0].min().item(), x[0].max().item()])
        )

    def run():
        llama(IDS)
        llama(IDS + 100)

    found = calibrate_ranges(llama, run)
    assert found == {name: (min(ends), max(ends)) for name, ends in seen.items()}
    assert all(len(layer._forward_pre_hooks) == 1 for layer in linear_layers(llama).values())
    with pytest.raises(RuntimeError, match="stop"):
        calibrate_ranges(llama, lambda: (_ for _ in ()).throw(RuntimeError("stop")))
    assert all(len(layer._forward_pre_hooks) == 1 for layer in linear_layers(llama).values())
    apply_input_transforms(llama, None, STATIC, found)
    assert calibrate_ranges(llama, run) == found, "the quantizers themselves are off meanwhile"
    with torch.no_grad():
        near = llama(IDS).logits
    apply_input_transforms(llama, None, ActivationSpec())
    assert 0 < (near - llama(IDS).logits).norm() < 0.2 * near.norm()


def test_bad_calibrations(llama):
    with pytest.raises(ConfigError, match=r"ran nothing through model\.layers\.0"):
        calibrate_ranges(llama, lambda: None)
    llama.model.layers[1].input_layernorm.weight.data[0] = float("inf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj: its input holds NaN or inf"):
        calibrate_ranges(llama, lambda: llama(IDS))


@pytest.mark.parametrize(
    ("rotation", "spec", "ranges", "said"),
    [
        (None, STATIC, None, "missing for .*'a'"),
        (None, STATIC, {"a": (0.0, 1.0), "b": (0.0, 1.0)}, "'b'"),
        (None, A8, {"a": (0.0, 1.0)}, "not with act_scheme=tensor"),
        (Rotation(0, 16, {"b": 1}), A8, None, "'b'"),
    ],
)
def test_stages_that_fit_no_layer_are_refused(rotation, spec, ranges, said):
    with pytest.raises(ConfigError, match=said):
        input_transforms(["a"], rotation, spec, ranges)


def test_sixteen_bit_models_give_what_the_float32_model_gives():
    """Within the rounding of bf16; and activations in 8 bits are nearer to those in 16 than those in 4 bits are."""
    model, wide = build_model("qwen2", dtype=torch.bfloat16), build_model("qwen2", dtype=torch.bfloat16).float()
    with torch.no_grad():
        whole = wide(IDS).logits
        apply_input_transforms(model, None, A8)
        apply_input_transforms(wide, None, A8)
        rounded, expected = model(IDS).logits.float(), wide(IDS).logits
        coarse = build_model("qwen2", dtype=torch.bfloat16)
        apply_input_transforms(coarse, None, ActivationSpec(bits=4))
        four = coarse(IDS).logits.float()
    size = whole.norm()
    assert (rounded - expected).norm() / size < 0.08
    assert 0 < (expected - whole).norm() / size < 0.05
    assert (four - whole).norm() / size > 3 * (rounded - whole).norm() / size
