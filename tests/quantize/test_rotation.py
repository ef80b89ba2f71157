"""QuaRot: the rotated model computes the same, its V is the plain one turned, and outlier channels are gone."""

import copy
import re

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, VOCAB, build_model, uneven
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from intactkv_eval.cell.spec import ActivationSpec, KVSpec, WeightSpec
from intactkv_eval.errors import PivotError, UnsupportedModelError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.kv_cache.prefix_cache import SharedPrefixCache
from intactkv_eval.kv_quant.quantizer import kv_quantizer_of
from intactkv_eval.kv_quant.token_head import TokenHead
from intactkv_eval.model.input_transforms import apply_input_transforms, input_transforms
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.quantize.rotation import rotate, signs, unrotated_rows
from intactkv_eval.weights.hadamard import hadamard_rows

OFF, A4 = ActivationSpec(), ActivationSpec(bits=4, clip=0.9)
IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))
ROTATED = ["llama", "mistral", "phi3", "qwen2", "qwen3", "odd heads", "every bias"]
PIVOT = (BOS, 7, 8)


def made(name, seed=0, dtype=torch.float32):
    if name in FAMILIES:
        model = build_model(name, seed, dtype)
        if name == "qwen2":
            model.config.tie_word_embeddings = True
            model.lm_head.weight = model.model.embed_tokens.weight
        return model
    torch.manual_seed(seed)
    shape = {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16}
    if name == "every bias":
        shape = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 12}
        shape |= {"attention_bias": True, "mlp_bias": True}
    config = LlamaConfig(
        vocab_size=VOCAB, intermediate_size=80, num_hidden_layers=2, max_position_embeddings=128, bos_token_id=BOS,
        initializer_range=0.15, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    return uneven(model, 0.2)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ROTATED)
def test_with_all_quantizers_off_it_is_the_plain_model(name):
    model = made(name)
    before, old = logits(model), copy.deepcopy(model.state_dict())
    rotation = rotate(model, seed=1)
    without = error(logits(model), before)
    apply_input_transforms(model, rotation, OFF)
    assert error(logits(model), before) < 1e-4
    assert without > 0.05, "the online transforms are needed"
    outputs = [key for key in old if re.search(r"(embed_tokens|o_proj|down_proj|lm_head)\.weight", key)]
    assert all(error(model.get_parameter(key), old[key]) > 0.5 for key in outputs)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    heads = model.config.num_attention_heads
    down = sum(name.endswith("down_proj") for name in rotation.online)
    assert down == model.config.num_hidden_layers
    assert len(rotation.online) == down * (1 if heads == 9 else 2), "9 heads have no matrix: the part per head alone"


def test_seeds_differ_and_are_the_same_everywhere():
    assert signs(8, 0).tolist() == signs(8, 0).tolist()
    assert signs(64, 0).tolist() != signs(64, 1).tolist()
    assert set(signs(64, 0).tolist()) == {1.0, -1.0}
    one, other = made("llama"), made("llama")
    plain = one.model.embed_tokens.weight.detach().clone()
    assert rotate(one, 0) == rotate(other, 0)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    torch.testing.assert_close(unrotated_rows(one.model.embed_tokens.weight, 0).float(), plain)


LAW_1 = {"rtol": 1.3e-6, "atol": 1e-5}  # torch.testing's for fp32: norms and RoPE compute in it also here


@pytest.mark.parametrize("name", ROTATED)
def test_law_1_in_the_rotated_basis(name):
    """The plain model's pivot, turned, in the rotated model = the plain model with the tokens in front."""
    model = made(name, dtype=torch.float64)
    pivot = capture(model, PIVOT, fingerprint_of(model, "main"))
    with torch.no_grad():
        plain = model(torch.cat([torch.tensor([PIVOT] * 2), IDS], dim=1)).logits[:, len(PIVOT) :]
    rotation = rotate(model)
    apply_input_transforms(model, rotation, OFF)
    turned = to_rotated(pivot)
    torch.testing.assert_close(PivotedModel(model, PIVOT, turned).body_logits(IDS), plain, **LAW_1)
    assert error(PivotedModel(model, PIVOT, pivot).body_logits(IDS), plain) > 1e-2
    own = capture(model, PIVOT, fingerprint_of(model, "main"))
    for layer, (key, value) in enumerate(zip(own.keys, own.values, strict=True)):
        torch.testing.assert_close(turned.keys[layer], key, **LAW_1)
        torch.testing.assert_close(turned.values[layer], value, **LAW_1)
    assert turned.fingerprint.basis == "hadamard"
    with pytest.raises(PivotError, match="its basis is hadamard"):
        to_rotated(turned)


@pytest.mark.parametrize(
    ("family", "said"), [("gemma3", "no layer to be fused into"), ("opt", "mean"), ("gpt2", "mean")]
)
def test_what_cannot_be_rotated_says_why_and_is_left_alone(family, said):
    model = build_model(family)
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=said):
        rotate(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("key", "size"), [("hidden_size", 66), ("intermediate_size", 90), ("head_dim", 18)])
def test_widths_without_a_matrix_are_named(key, size):
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16} | {key: size}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=1, num_attention_heads=2, **shape)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=f"its {key} is {shape[key]}"):
        rotate(model)


def test_twice_or_quantized_is_refused():
    model = made("llama")
    apply_input_transforms(model, rotate(model), OFF)
    with pytest.raises(UnsupportedModelError, match=r"down_proj|o_proj"):
        rotate(model)


def with_outliers():
    """A residual stream with a few channels far larger than the rest, as real models have it."""
    model = made("llama", seed=3)
    with torch.no_grad():
        for channel in (5, 40):
            model.model.embed_tokens.weight[:, channel] = 16 * torch.sign(torch.randn(VOCAB))
    return model


@pytest.mark.parametrize("weights", [WeightSpec(), WeightSpec(method="rtn", bits=4, group_size=-1, symmetric=True)])
def test_rotated_four_bits_are_better_where_channels_stand_out(weights):
    plain = with_outliers()
    expected = F.log_softmax(logits(plain), dim=-1)
    found = {}
    for turned in (False, True):
        model = copy.deepcopy(plain)
        rotation = rotate(model) if turned else None
        if weights.method == "none":
            apply_input_transforms(model, rotation, A4)
        else:
            model = quantize_model(model, weights, stages=input_transforms(list(linear_layers(model)), rotation, A4))
        found[turned] = (F.log_softmax(logits(model), dim=-1) - expected).square().mean().sqrt().item()
    assert found[True] < 0.75 * found[False], found


def test_keys_are_quantized_rotated_and_stay_in_the_plain_basis():
    """kv_rotate against the formula; at 8 bits K is K."""
    keys = torch.randn(2, 3, 5, 16)
    keys[..., 3] *= 30
    turn = hadamard_rows(torch.eye(16, dtype=torch.float64))
    spec = KVSpec(bits=4, rotate=True, clip=0.95)
    turned = (keys.double() @ turn).float()
    low, high = (end.clamp(**{bound: 0}) * 0.95 for end, bound in zip(torch.aminmax(turned, dim=-1, keepdim=True), ("max", "min"), strict=True))  # fmt: skip
    step = (high - low) / 15
    zero = (-low / step).round()
    codes = ((turned / step).round() + zero).clamp(0, 15)
    expected = (((codes - zero) * step).double() @ turn.t()).float()
    scheme = TokenHead(spec.bits, spec.rotate, spec.clip)
    found = scheme.keys(keys, 0, torch.arange(5)[None])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert error(found, keys) < error(TokenHead(spec.bits).keys(keys, 0, torch.arange(5)[None]), keys)
    fine = TokenHead(8, rotate=True)
    torch.testing.assert_close(fine.keys(keys, 0, torch.arange(5)[None]), keys, rtol=0, atol=0.3)


def test_both_caches_turn_keys_and_leave_values_to_the_weights():
    """A second transform of V would undo that of the rotated weights."""
    spec, places = KVSpec(bits=3, rotate=True), torch.arange(5)[None]
    keys, values = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    model = made("llama")
    writer, plain = kv_quantizer_of(spec, model), TokenHead(3)
    for cache in (PivotCache(model.config, 1, writer), SharedPrefixCache([], 1, writer, places)):
        held = cache.update(keys, values, 0)
        assert torch.equal(held[0], writer.scheme.keys(keys, 0, places))
        assert not torch.equal(held[0], plain.keys(keys, 0, places))
        assert torch.equal(held[1], plain.values(values, 0, places))
