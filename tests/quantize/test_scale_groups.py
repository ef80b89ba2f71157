"""Folding leaves a block's function as it was, in every supported family, and V's basis is what pivot/basis.py finds."""

import pytest
import torch
from helpers.blocks import make_block, output_error, outputs
from helpers.tiny import FAMILIES, uneven
from torch import nn
from transformers import AutoModelForCausalLM

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.quantize.scale_groups import divide_outputs, fold, scale_groups

SUPPORTED = sorted(set(FAMILIES) - {"gpt2"})


def small(family, kv_heads=4, dtype=torch.float64, **more):
    config = FAMILIES[family]()
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = kv_heads
    for key, value in more.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return uneven(model, 0.3)


def scales_of(block, seed=1):
    generator = torch.Generator().manual_seed(seed)
    widths = [block.layers[group.layers[0]].in_features for group in scale_groups(block)]
    drawn = [torch.exp(torch.randn(width, generator=generator)) for width in widths]
    return list(zip(scale_groups(block), drawn, strict=True))


def put(block, matrices):
    with torch.no_grad():
        for name, matrix in matrices.items():
            block.layers[name].weight.copy_(matrix)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("family", SUPPORTED)
def test_folding_is_no_change_of_function(family, kv_heads):
    block = make_block(small(family, kv_heads))
    expected = outputs(block)
    before = {name: layer.weight.clone() for name, layer in block.layers.items()}
    scales = scales_of(block)
    put(block, fold(block, scales))
    bound = 1e-10 if family == "opt" else 1e-5 if family == "gemma3" else 1e-6  # their norms compute in fp32
    torch.testing.assert_close(outputs(block), expected, rtol=bound, atol=bound)
    for group, _ in scales:
        for name in group.layers:
            assert not torch.allclose(block.layers[name].weight, before[name], rtol=0.1)
    # Every single fold changes the function where only one half of it is made.
    for group, scale in scales:
        with torch.no_grad():
            layer = block.layers[group.layers[-1]]
            layer.weight.mul_(scale)
            assert not torch.allclose(outputs(block), expected, rtol=1e-3, atol=1e-3)
            layer.weight.div_(scale)


@pytest.mark.parametrize(
    ("family", "kv_heads", "places"),
    [
        ("llama", 2, ["qkv", "mlp", "mlp output"]),
        ("llama", 4, ["qkv", "values", "mlp", "mlp output"]),
        ("gemma3", 4, ["qkv", "values", "mlp", "mlp output"]),
        ("phi3", 4, ["qkv", "mlp", "mlp output"]),
        ("opt", 4, ["values", "qkv", "mlp", "mlp output"]),
    ],
)
def test_places(family, kv_heads, places):
    assert [group.place for group in scale_groups(make_block(small(family, kv_heads)))] == places


def test_heads_that_do_not_fill_the_width_leave_v_alone():
    """head_dim * heads != hidden size: V and O have no equal shapes, so AWQ's readers expect no scale there."""
    block = make_block(small("llama", head_dim=32))
    assert block.layers["self_attn.v_proj"].out_features == 128
    assert "values" not in [group.place for group in scale_groups(block)]


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"do_layer_norm_before": False}, ["values", "mlp output"]),
        ({"activation_function": "gelu"}, ["values", "qkv", "mlp"]),
    ],
)
def test_opt_that_is_put_together_otherwise(changes, places):
    """A norm whose output is the residual too, or an activation that lets no scale through, is no place for one."""
    block = make_block(small("opt", **changes))
    expected = outputs(block)
    assert [group.place for group in scale_groups(block)] == places
    put(block, fold(block, scales_of(block)))
    torch.testing.assert_close(outputs(block), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_what_a_bf16_norm_rounds_away_is_made_up_for(family):
    """The function kept is that of the norm as it is stored: only the bias of a LayerNorm is rounded a second time."""
    rounded = make_block(small(family, dtype=torch.bfloat16))
    exact = make_block(small(family, dtype=torch.bfloat16).double())
    exact.inputs[:] = [hidden.double() for hidden in rounded.inputs]
    expected = outputs(exact)
    scales = [(group, scale) for group, scale in scales_of(rounded) if group.place in {"qkv", "mlp"}]
    matrices = fold(rounded, scales)
    assert {matrix.dtype for matrix in matrices.values()} == {torch.float32}
    with torch.no_grad():
        for name, parameter in exact.module.named_parameters():
            parameter.copy_(rounded.module.get_parameter(name))
    put(exact, matrices)
    bound = 1e-4 if family == "opt" else 1e-12
    assert output_error(exact, expected) < bound
    divided = fold(rounded, [])  # the layers themselves have been left as they were
    assert all(torch.equal(divided[name], layer.weight.float()) for name, layer in rounded.layers.items())


def test_unknown_blocks_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.1: .* in a GPT2Block\. Known are Gemma3"):
        scale_groups(make_block(small("gpt2")))
    block = make_block(small("llama"))
    del block.module.mlp.up_proj
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1 \(LlamaDecoderLayer\) has no mlp\.up_proj"):
        scale_groups(block)
    block = make_block(small("llama"))
    block.module.input_layernorm.weight = nn.Parameter(torch.ones(32))
    with pytest.raises(UnsupportedModelError, match=r"input_layernorm \(LlamaRMSNorm\) is neither .* 64 channels"):
        scale_groups(block)
    block = make_block(small("llama"))
    del block.layers["mlp.down_proj"]
    with pytest.raises(UnsupportedModelError, match=r"mlp\.down_proj \(Linear\) is none of its linear layers"):
        scale_groups(block)
    with pytest.raises(UnsupportedModelError, match="is neither a norm nor a linear layer"):
        divide_outputs(nn.Linear(4, 4), "small", torch.ones(8))
