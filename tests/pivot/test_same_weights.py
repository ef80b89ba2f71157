"""Samples of weights against samples: copies in 2 to 8 bits are told from copies of other models.

The bounds of same_weights.py were measured on SmolLM2-135M (210 matrices; worst of the right ones, best of the wrong):

    right: RTN, 2 to 8 bits, groups of 32, 64 and rows      cosine 0.63  steps 0.59  swapped 0
           GPTQ, 2 bits, groups of 64 and rows              cosine 0.65  steps 0.84  (3 bits: 0.89, 0.80; 4: 0.97, 0.61)
           nf4, fp4, int8 (bitsandbytes, torchao)           cosine 0.99  steps 0.42  residual of int8 0.013  swapped 0
           behind factors fitted by row and column, 2 bits  cosine 0.68
    wrong: other weights, 2 bits                            cosine 0.07  steps 1.33  behind factors 0.35
           1% of noise, not rounded                         swapped 0.013
"""

import copy

import pytest
import torch
from helpers.tiny import build_model
from torch import nn

from intactkv_eval.errors import PivotError
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.same_weights import GroupStructure, Rules, check_same, difference
from intactkv_eval.pivot.weight_sample import Sampled, weight_sample
from intactkv_eval.quantize.rtn import quantize_rtn

DECLARED = Rules(nearest="all", dequantized=True)


def expected_of(model):
    return {name: sampled.numbers for name, sampled in weight_sample(model).items()}


def rounded(model, bits, group_size=32):
    return quantized_model(model, lambda matrix, name: quantize_rtn(matrix, bits, group_size, None, name))


def check(model, reference, rules):
    return check_same(weight_sample(model), expected_of(reference), rules, "the copy", "reference=it")


def changed(model, size, only=""):
    """`model` with noise of `size` of each tensor's own, in the tensors whose names hold `only`."""
    other = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if only in name:
                parameter.add_(size * parameter.std() * torch.randn_like(parameter))
    return other


class Coded(nn.Module):
    """What a library's own layer looks like: codes in place of a matrix, and no word of how they are read."""

    def __init__(self, layer, bits):
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        weight = quantize_rtn(layer.weight.detach(), bits, 32, None, "layer")
        self.register_buffer("codes", weight.dequantize(torch.float32).mul(2**16).round().int())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())

    def forward(self, x):
        y = nn.functional.linear(x, self.codes.to(x.dtype) / 2**16)
        return y if self.bias is None else y + self.bias


def coded(model, bits):
    other = copy.deepcopy(model)
    for name, layer in linear_layers(other).items():
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, Coded(layer, bits))
    return other


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_rounded_copy_is_one(model, bits):
    expected = expected_of(model)
    for group_size in (32, -1):
        found = weight_sample(rounded(model, bits, group_size))
        for rules in (Rules(), DECLARED, Rules(scaled=True)):
            assert 0.001 < check_same(found, expected, rules._replace(bits=bits), "the copy", "reference=it") < 1
    assert check(model, model, Rules()) is None


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rules", [Rules(), DECLARED, Rules(scaled=True)], ids=["GPTQ", "nearest", "AWQ"])
def test_other_weights_are_refused_by_their_name(llama, bits, rules):
    for only in ("layers.1.mlp.down_proj", "layers.2.self_attn.k_proj"):
        other = changed(llama, 10, only)
        with pytest.raises(PivotError, match=rf"not made from reference=it: {only}\.weight differs .* by \d\.\d\d of"):
            check(rounded(other, bits), llama, rules._replace(bits=bits))


@pytest.mark.parametrize("make", [rounded, coded], ids=["packed", "a library's layers"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_sibling_that_differs_by_a_little_is_refused(llama, make, bits):
    """Fine-tuned: 3% of each matrix of the layers and nothing else, which rounding hides but for the order of numbers."""
    other = changed(llama, 0.03, "_proj")
    assert check(make(llama, bits), llama, DECLARED) > 0.001
    with pytest.raises(PivotError, match=r"orders .* of its numbers otherwise"):
        check(make(other, bits), llama, DECLARED)


@pytest.mark.parametrize("only", ["norm", "embed_tokens", "lm_head"])
@pytest.mark.parametrize("rules", [Rules(), Rules(scaled=True)], ids=["GPTQ", "AWQ"])
def test_what_neither_quantizes_is_the_same_number_for_number(llama, only, rules):
    """A thousandth is enough: in fp32, and by what bf16 shows of it. AWQ may scale the norms inside the layers."""
    other = changed(llama, 1e-3, only)
    for dtype, seen in ((torch.float32, llama), (torch.bfloat16, copy.deepcopy(llama).bfloat16())):
        if dtype is torch.bfloat16 and only == "norm":
            continue  # below half of its last digit
        with pytest.raises(PivotError, match=r"norm|embeddings|lm_head"):
            check(rounded(copy.deepcopy(other).to(dtype), 4), seen, rules)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seen", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3", "gpt2"])
def test_rounding_of_the_stored_dtypes_is_allowed(family, stored, seen):
    """An fp32 model, its copy stored in 16 bits, and both evaluated in any dtype."""
    model = build_model(family)
    copied = copy.deepcopy(model).to(stored).to(seen)
    assert check(copied, copy.deepcopy(model).to(seen), Rules()) is None
    assert check(rounded(copied, 4), copy.deepcopy(model).to(seen), DECLARED) > 0.01


def test_numbers_that_fp16_cannot_hold():
    found = torch.tensor([1e-7, 3e-6, 1.0, 70000.0])
    assert difference(found.half().float(), found) is None
    assert difference(found, found * 1.01) is not None
    assert difference(torch.tensor([float("nan")]), torch.ones(1)) is not None


def test_a_plain_copy_may_be_on_a_grid_or_equal_and_nothing_else(llama):
    """What says nothing of its quantization: GGUF, and matrices that were rounded and stored in 16 bits."""
    plain = Rules(nearest="fine", dequantized=True, words=True)
    for bits in (2, 4, 8):
        copied = copy.deepcopy(llama)
        with torch.no_grad():
            for name, layer in linear_layers(copied).items():
                layer.weight.copy_(quantize_rtn(layer.weight, bits, 32, None, name).dequantize(torch.float32))
            words = copied.get_input_embeddings().weight
            words.copy_(quantize_rtn(words, 8, 32, None, "words").dequantize(torch.float32))
        assert check(copied, llama, plain) > 0.001
    for only in ("_proj", "norm", "embed"):
        with pytest.raises(PivotError, match="is not made from"):
            check(changed(llama, 0.03, only), llama, plain)


def test_a_padded_vocabulary_and_tied_embeddings(llama):
    padded = copy.deepcopy(llama)
    padded.resize_token_embeddings(320)
    assert check(rounded(padded, 4), llama, Rules()) > 0.01
    assert check(rounded(llama, 4), padded, Rules()) > 0.01
    other = changed(padded, 0.03, "embed_tokens")
    with pytest.raises(PivotError, match=r"embeddings\.weight, which neither quantizes"):
        check(rounded(other, 4), llama, Rules())


def test_dead_rows_and_channels_tell_nothing(llama):
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.v_proj.weight.zero_()
            layer.mlp.up_proj.weight[:, 5] = 0
            layer.input_layernorm.weight.zero_()
    for rules in (Rules(), DECLARED, Rules(scaled=True)):
        assert check(rounded(llama, 2), llama, rules) < 1


def test_a_sample_is_of_what_is_multiplied_by_and_changes_nothing(llama):
    """A library's layer is asked for its columns, beside a bias in which they would be lost."""
    with torch.no_grad():
        for layer in llama.model.layers:
            layer.self_attn.q_proj.bias = nn.Parameter(torch.full((64,), 1e4))
    other = coded(llama, 8)
    found, packed = weight_sample(other), weight_sample(rounded(llama, 8))
    name = "layers.0.self_attn.q_proj.weight"
    assert not found[name].plain
    torch.testing.assert_close(found[name].numbers, packed[name].numbers, rtol=0, atol=2**-16)
    assert other.model.layers[0].self_attn.q_proj.bias is not None


def test_another_architecture(llama):
    found, expected = weight_sample(llama), expected_of(build_model("qwen3"))
    with pytest.raises(PivotError, match=r"the former holds no tensor .*norm\.weight: it is not of this architecture"):
        check_same(found, expected, Rules(), "the copy", "reference=it")
    with pytest.raises(PivotError, match="no matrix of the same name"):
        check_same({"a.b": Sampled(torch.ones(2, 2), True)}, {"c.d": torch.ones(2, 2)}, Rules(), "x", "y")


def test_groups_by_hand():
    q = torch.tensor([[0.0, 1.0, 1.0, 3.0]], dtype=torch.float64)
    w = torch.tensor([[0.1, 0.9, 1.2, 2.8]], dtype=torch.float64)
    assert not GroupStructure(q, w).are_fine()
    assert GroupStructure(w, w).are_fine()
    gaps = torch.tensor([1.0, 2.0, 2.0, 2.0]) / 2  # the farther neighbour
    assert GroupStructure(q, w).steps() == pytest.approx(float((q - w).norm() / gaps.norm()))
    assert GroupStructure(q, w).swapped() == 0
    assert GroupStructure(q, w.flip(1)).swapped() == 3 / 4


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("told", [True, False])
def test_a_reference_that_lies_on_a_coarse_grid_itself(bits, told):
    """A model that was read from a 4-bit GGUF file: a copy in 4 bits takes as many values as it, and is rounded still."""
    reference = build_model("llama")
    on_grid(reference, 4, 16)
    spread = changed(reference, 0.1 if bits <= 4 else 0.0)  # errors of other numbers, as GPTQ spreads them
    on_grid(spread, bits, 32)
    rules = Rules(bits=bits if told else None, dequantized=True)
    with torch.no_grad():  # norms and embeddings are the reference's
        for name, parameter in reference.named_parameters():
            if name.removesuffix(".weight") not in linear_layers(reference):
                spread.get_parameter(name).copy_(parameter)
    for copied in (rounded(reference, bits), spread):
        check(copied, reference, rules)
    with pytest.raises(PivotError, match="is not made from reference=it"):
        check(rounded(build_model("llama", seed=5), bits), reference, rules)


@torch.no_grad()
def on_grid(model, bits, group_size):
    for name, layer in linear_layers(model).items():
        layer.weight.copy_(quantize_rtn(layer.weight, bits, group_size, None, name).dequantize(torch.float32))
