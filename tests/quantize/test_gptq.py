"""GPTQ does what its algorithm says: against the plain column-by-column elimination, and against RTN."""

import pytest
import torch
from helpers.tiny import FAMILIES, build_model

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.model.matrices import matrix_of
from intactkv_eval.quantize.block_walk import BlockWalk
from intactkv_eval.quantize.gptq import GPTQ, gptq, hessians, input_groups, inverse_root
from intactkv_eval.quantize.rtn import group_range, quantize_in_range, quantize_rtn
from intactkv_eval.quantize.shrink import shrunk_range

TOKENS = [torch.arange(start, start + 40) % 250 for start in (3, 90, 170)]


def problem(outputs=24, inputs=64, tokens=400, seed=0):
    torch.manual_seed(seed)
    mix = torch.randn(inputs, inputs) / 4 + torch.eye(inputs)
    x = torch.randn(tokens, inputs) @ mix * torch.linspace(0.2, 3, inputs)
    return torch.randn(outputs, inputs) / 8, x, x.t() @ x / tokens


def eliminated(weight, hessian, options):
    """Optimal brain quantization, one column and one full inverse at a time, in fp64."""
    size = options.group_size if options.group_size > 0 else weight.shape[1]
    inputs = weight.shape[1]
    order = hessian.diagonal().argsort(descending=True, stable=True) if options.act_order else torch.arange(inputs)
    left, matrix = weight.double()[:, order].clone(), hessian.double()[order][:, order]
    inverse = torch.linalg.inv(
        matrix + options.damp * matrix.diagonal().mean() * torch.eye(inputs, dtype=torch.float64)
    )
    result = torch.empty_like(left)
    static = options.static_groups or size == inputs
    for j in range(inputs):
        if static:
            group = int(order[j]) // size
            source = weight[:, group * size : (group + 1) * size]
        else:
            if j % 128 == 0:
                at_start = left.float().clone()
            source = at_start[:, j : j + size] if j % size == 0 else source
        made = quantize_rtn(source, options.bits, -1, options.symmetric, scale_dtype=torch.float16)
        scale, zero = made.scales[:, 0].double(), made.zeros[:, 0].double()
        codes = (torch.round(left[:, j] / scale) + zero).clamp(0, 2**options.bits - 1)
        result[:, j] = (codes - zero) * scale
        error = (left[:, j] - result[:, j]) / inverse[j, j]
        left[:, j:] -= error[:, None] * inverse[j, j:][None]
        inverse -= inverse[:, j][:, None] * inverse[j][None] / inverse[j, j]
    return result[:, torch.argsort(order)]


def assert_eliminated(weight, hessian, options):
    found = gptq(weight, hessian, options).dequantize(torch.float64)
    expected = eliminated(weight, hessian, options)
    same = ((found - expected).abs() < 1e-4).double().mean()
    assert same > 0.98, "beside ties that fp32 and fp64 break in two ways"
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("symmetric", [None, "gptq", "quarot"])
@pytest.mark.parametrize(("act_order", "static_groups"), [(False, False), (True, False), (True, True), (False, True)])
def test_it_is_optimal_brain_quantization(group_size, symmetric, act_order, static_groups):
    weight, _, hessian = problem()
    options = GPTQ(3, group_size, symmetric, act_order, static_groups)
    assert_eliminated(weight, hessian, options)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_layers_output_is_nearer_than_rtns(bits):
    weight, x, hessian = problem()

    def error(quantized):
        return float(((quantized.dequantize() - weight) @ x.t()).square().mean())

    rtn = error(quantize_rtn(weight, bits, 16))
    for act_order in (False, True):
        assert error(gptq(weight, hessian, GPTQ(bits, 16, act_order=act_order))) < 0.8 * rtn


def test_without_correlation_it_is_rtn():
    weight, _, _ = problem()
    found = gptq(weight, torch.eye(64), GPTQ(4, 16, act_order=False))
    expected = quantize_rtn(weight, 4, 16, scale_dtype=torch.float16)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)


def test_groups_wider_than_a_lazy_batch_and_inputs_that_are_never_used():
    weight, _, hessian = problem(inputs=256)
    options = GPTQ(4, 256, act_order=False)
    assert_eliminated(weight, hessian, options)
    hessian[5], hessian[:, 5] = 0, 0
    found = gptq(weight, hessian, options).dequantize()
    assert (found[:, 5] == 0).all()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("group_size", [16, 96])
@pytest.mark.parametrize("act_order", [False, True])
def test_groups_that_begin_inside_of_a_block_and_reach_into_the_next(group_size, act_order):
    weight, _, hessian = problem(outputs=8, inputs=288, tokens=900)
    assert_eliminated(weight, hessian, GPTQ(4, group_size, None, act_order, static_groups=False))


def test_a_matrix_that_is_not_positive_definite_is_damped_more_or_refused(caplog):
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.05
    inverse_root(indefinite, 0.01, "a layer")
    assert "needed damping 0.1" in caplog.text
    indefinite[0, 1] = indefinite[1, 0] = 3
    with pytest.raises(CheckpointError, match="a layer: GPTQ's matrix"):
        inverse_root(indefinite, 0.01, "a layer")
    with pytest.raises(ConfigError, match="damp=2"):
        GPTQ(4, 64, damp=2)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_block_of_every_family(family):
    model = build_model(family)
    block = BlockWalk(model, TOKENS).block(0)
    groups = input_groups(block)
    assert sorted(name for names in groups for name in names) == sorted(block.layers)
    fused = {"gpt2", "phi3"}
    assert len(groups[0]) == (1 if family in fused else 3), "q, k and v have one input"
    seen = []
    hook = block.layers[groups[0][0]].register_forward_pre_hook(lambda module, args: seen.append(args[0][0].detach()))
    for place, hidden in enumerate(block.inputs):
        block.run(hidden, place)
    hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(hessians(block, groups)[0], x.t() @ x * 2 / len(TOKENS), rtol=1e-4, atol=1e-3)
    found = GPTQ(4, 32).quantize(block)
    assert list(found) == list(block.layers)
    for name, layer in block.layers.items():
        assert torch.equal(matrix_of(layer), found[name].dequantize(torch.float32))
        assert not layer._forward_pre_hooks


@pytest.mark.parametrize("symmetric", [None, "gptq", "quarot"])
def test_a_shrunk_range_errs_no_more(symmetric):
    """Against every share of the range tried one by one, in the norm of 2.4."""
    weight = problem()[0]
    weight[:, 3] *= 6

    def error(share):
        low, high = (end * share for end in group_range(weight, 32))
        made = quantize_in_range(weight, (low, high), 3, 32, torch.float16, symmetric).dequantize(torch.float32)
        return (made - weight).abs().pow(2.4).view(24, 2, 32).sum(dim=-1)

    tried = torch.stack([error(1 - step / 100) for step in range(80)])
    low, high = shrunk_range(weight, 3, 32, symmetric, torch.float16)
    found = quantize_in_range(weight, (low, high), 3, 32, torch.float16, symmetric).dequantize(torch.float32)
    torch.testing.assert_close((found - weight).abs().pow(2.4).view(24, 2, 32).sum(dim=-1), tried.amin(dim=0))
    assert (tried.amin(dim=0) < 0.9 * tried[0]).any()
