"""AWQ: never worse than RTN in what it judges by, clearly better with salient channels, and nothing left behind."""

import copy

import pytest
import torch
from helpers.blocks import Front, error_of, make_block, output_error, outputs, planted_block
from helpers.tiny import build_model
from torch import nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, LlamaConfig

from intactkv_eval.errors import CheckpointError, ConfigError, UnsupportedModelError
from intactkv_eval.pivot.basis import recover
from intactkv_eval.quantize.awq import AWQ
from intactkv_eval.quantize.awq_search import clipped
from intactkv_eval.quantize.omniquant import OmniQuant
from intactkv_eval.quantize.rtn import quantize_rtn

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "opt", "phi3"]
METHODS = [AWQ(3, 32), OmniQuant(3, 32, epochs=2)]
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


@pytest.mark.parametrize("family", FAMILIES)
def test_salient_channels_are_kept(family):
    """Scaling alone, and clipping on top of it, each lower the error of the block's output."""
    plain = error_of(None, family)
    scaled, clipped_too = error_of(AWQ(3, 32, clip=False), family), error_of(AWQ(3, 32), family)
    assert scaled < 0.75 * plain
    assert clipped_too < scaled


def test_one_ratio_is_rtn():
    """A grid of one is r = 0: s = 1, which makes the same codes as RTN, and leaves the norms as they were."""
    found, block = AWQ(4, 16, grid=1, clip=False).quantize(planted_block()), planted_block()
    for name, weight in found.items():
        expected = quantize_rtn(block.layers[name].weight, 4, 16, scale_dtype=torch.float16)
        assert weight.digest() == expected.digest()


def test_the_ratio_is_the_best_of_the_grid():
    """By hand for down_proj of a Llama: every s = a**r, the error of the layer's output, the least of them."""
    block = planted_block()
    seen, layer = [], block.layers["mlp.down_proj"]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs(block)
    handle.remove()
    x, weight = torch.cat(seen).reshape(-1, layer.in_features), layer.weight.detach().clone()
    up = block.layers["mlp.up_proj"].weight.detach().clone()
    errors = {}
    for step in range(20):
        s = x.abs().mean(dim=0) ** (step / 20)
        s = s.clamp(min=1e-4) / (s.clamp(min=1e-4).max() * s.clamp(min=1e-4).min()).sqrt()
        rounded = quantize_rtn(weight * s, 3, 32, scale_dtype=torch.float16).dequantize(torch.float32) / s
        errors[step] = (float((linear(x, rounded) - linear(x, weight)).square().mean()), s)
    best = min(errors.values(), key=lambda pair: pair[0])[1]
    assert best.std() > 0.01
    found = AWQ(3, 32, clip=False).quantize(block)
    expected = quantize_rtn(weight * best, 3, 32, scale_dtype=torch.float16)
    assert torch.equal(found["mlp.down_proj"].unpacked(), expected.unpacked())
    norm = block.module.post_attention_layernorm.weight / planted_block().module.post_attention_layernorm.weight
    small = up / norm / best[:, None]  # what up_proj must have become before it was rounded
    assert (found["mlp.up_proj"].dequantize(torch.float32) - small).norm() < 0.3 * small.norm()


def test_clipping_is_the_best_of_its_steps():
    """Against the search written out for every group, with each token's error itself; also with fewer tokens."""
    torch.manual_seed(0)
    weight, method = torch.randn(5, 64) ** 3, AWQ(3, 16)
    for count in (7, 100):
        tokens = torch.randn(count, 64) * torch.rand(64) * 4
        found = method.clip_search(weight, tokens)
        for row in range(5):
            for group in range(4):
                part = slice(16 * group, 16 * group + 16)
                w, x = weight[row : row + 1, part], tokens[:, part]
                errors = []
                for step in range(21):
                    cut = w.clamp(-w.abs().max() * (1 - step / 40), w.abs().max() * (1 - step / 40))
                    rounded = quantize_rtn(cut, 3, 16, scale_dtype=torch.float16).dequantize(torch.float32)
                    errors.append(float((x @ (rounded - w).T).square().sum()))
                chosen = round((1 - float(found[row, group] / w.abs().max())) * 40)
                assert errors[chosen] <= min(errors) * (1 + 1e-4)
        assert (found < weight.view(5, 4, 16).abs().amax(-1)).any()
        rounded = quantize_rtn(clipped(weight, found), 3, 16).dequantize()
        plain = quantize_rtn(weight, 3, 16).dequantize()
        errors = [((w - weight) @ tokens.T).square().sum() for w in (rounded, plain)]
        assert errors[0] < errors[1]


def test_queries_and_keys_are_not_clipped():
    with_clip, without = AWQ(3, 32).quantize(planted_block()), AWQ(3, 32, clip=False).quantize(planted_block())
    same = {n.rpartition(".")[2] for n in with_clip if with_clip[n].digest() == without[n].digest()}
    assert same == {"q_proj", "k_proj"}


@pytest.mark.parametrize("symmetric", [None, "gptq", "awq", "omniquant"])
@pytest.mark.parametrize("method", [AWQ, OmniQuant])
def test_block_computes_with_what_is_returned(method, symmetric):
    extra = {"epochs": 1} if method is OmniQuant else {}
    block = planted_block("qwen2")
    found = method(4, 32, symmetric=symmetric, **extra).quantize(block)
    assert list(found) == list(block.layers)
    for name, weight in found.items():
        assert weight.scales.dtype == torch.float16
        assert torch.equal(block.layers[name].weight, weight.dequantize(torch.float32))
        assert not symmetric or (weight.zeros == 8).all()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bytes_and_nothing_left_behind(method, dtype):
    def portrait(module):
        parameters = [(n, id(p), p.dtype, p.requires_grad, p.grad) for n, p in module.named_parameters()]
        return parameters, {
            name: (id(part), type(part), sorted(vars(part)), [dict(getattr(part, kind)) for kind in HOOKS])
            for name, part in module.named_modules()
        }

    def once():
        block = make_block(build_model("opt", dtype=dtype), planted=(3, 17))
        block.module.fc1.weight.requires_grad_(False)
        before, inputs = portrait(block.module), copy.deepcopy(block.inputs)
        found = method.quantize(block)
        assert portrait(block.module) == before
        assert all(torch.equal(one, other) for one, other in zip(inputs, block.inputs, strict=True))
        return {name: weight.digest() for name, weight in found.items()}, block.module.state_dict()

    with torch.no_grad():
        first = once()
    second = once()
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], tensor) for name, tensor in second[1].items())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_failure_leaves_the_block_as_it_was(method):
    block = planted_block()
    weights = {name: (id(tensor), tensor.clone()) for name, tensor in block.module.named_parameters()}
    block.inputs[2][0, 3, 5] = float("nan")
    with pytest.raises((CheckpointError, ConfigError), match=r"model\.layers\.1.*not finite"):
        method.quantize(block)
    for name, parameter in block.module.named_parameters():
        assert id(parameter) == weights[name][0]
        assert torch.equal(parameter, weights[name][1])
    assert all(not getattr(module, kind) for module in block.module.modules() for kind in HOOKS)


def multi_head(front=None, samples=4):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.08,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    return make_block(model, samples=samples, planted=(3, 40), front=front)


@pytest.mark.parametrize("method", [AWQ(4, 64), OmniQuant(4, 64, epochs=1)], ids=lambda m: type(m).__name__)
def test_basis_of_v_is_the_one_that_is_recovered(method):
    """With V of a pivot in front: what `divide_values` is told is what pivot/basis.py finds, and the pivot then fits."""
    torch.manual_seed(1)
    front = Front(torch.randn(1, 4, 3, 32), 3 * torch.randn(1, 4, 3, 32))
    values, block, plain = front.values.clone(), multi_head(front), multi_head()
    expected = outputs(block)
    found = method.quantize(block)
    told = (values / front.values)[0, :, 0].flatten()
    assert told.log().std() > 0.1
    norms = (plain.module.input_layernorm.weight, block.module.input_layernorm.weight)
    value = found["self_attn.v_proj"].dequantize(torch.float32)
    basis = recover(value, plain.layers["self_attn.v_proj"].weight.detach(), *(norm.detach() for norm in norms), True)
    assert basis.residual < 0.2
    torch.testing.assert_close(basis.ratio.float(), 1 / told, rtol=0.06, atol=0)
    near = output_error(block, expected)
    front.values = values  # the pivot in the basis of the full-precision model
    assert output_error(block, expected) > 5 * near


def test_what_is_no_setting_and_what_does_not_fit():
    for method in (AWQ, OmniQuant):
        with pytest.raises(ConfigError, match="bits=5"):
            method(5, 32)
        with pytest.raises(ConfigError, match="group_size=0: use a width"):
            method(4, 0)
        with pytest.raises(
            ConfigError, match=r"group_size=48 does not divide the width 64 of model\.layers\.1\.self_attn"
        ):
            method(4, 48).quantize(planted_block())
        with pytest.raises(UnsupportedModelError, match="GPT2Block"):
            method(4, 32).quantize(make_block(build_model("gpt2")))
    with pytest.raises(ConfigError, match="awq: grid=0"):
        AWQ(4, 32, grid=0)


def test_whole_rows():
    block = planted_block()
    found = AWQ(4, -1).quantize(block)
    assert found["mlp.down_proj"].group_size == 96
    assert isinstance(block.layers["mlp.down_proj"], nn.Linear)
