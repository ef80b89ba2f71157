"""The formulas of the schemes, against plain torch written here."""

import pytest
import torch
from helpers.kv_cells import levels_of
from helpers.tiny import BOS, FAMILIES, build_model
from transformers import Phi3Config, Phi3ForCausalLM

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.channel_key import ChannelKey
from intactkv_eval.kv_quant.pre_rope import PreRope
from intactkv_eval.kv_quant.quantizer import KVQuantizer, kv_quantizer_of
from intactkv_eval.kv_quant.rotary import find_rotary
from intactkv_eval.kv_quant.token_head import TokenHead

SMALL = {
    "vocab_size": 259,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.15,
}


def states(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def by_hand(numbers, bits):
    """A flat list of numbers by its own minimum and maximum."""
    low, high = min(numbers), max(numbers)
    step = (high - low) / (2**bits - 1)
    return [low + round((number - low) / step) * step for number in numbers] if step else list(numbers)


def around_zero(numbers, bits, clip=1.0, with_zero=False):
    """A flat list of numbers, at whole multiples of the step."""
    ends = [*numbers, 0.0] if with_zero else numbers
    low, high = min(ends) * clip, max(ends) * clip
    step = (high - low) / (2**bits - 1)
    zero = round(-low / step)
    return [(min(max(round(number / step) + zero, 0), 2**bits - 1) - zero) * step for number in numbers]


@pytest.mark.parametrize("bits", [2, 4])
def test_token_head(bits):
    rows = states(2, 2, 5, 8)
    rows[1, 1, 4] += 9  # no zero among them
    found, clipped = TokenHead(bits), TokenHead(bits, clip=0.9)
    for b, h, t in [(0, 0, 0), (1, 1, 4), (0, 1, 3)]:
        row = rows[b, h, t].tolist()
        for scheme, keys, values in [
            (found, around_zero(row, bits), around_zero(row, bits)),
            (clipped, around_zero(row, bits, 0.9, with_zero=True), around_zero(row, bits, 0.9)),
        ]:
            assert scheme.keys(rows, 0, torch.zeros(1, 1))[b, h, t].tolist() == pytest.approx(keys, abs=1e-12)
            assert scheme.values(rows, 0, torch.zeros(1, 1))[b, h, t].tolist() == pytest.approx(values, abs=1e-12)


@pytest.mark.parametrize(
    "scheme", [TokenHead(4), TokenHead(4, clip=0.9), TokenHead(4, rotate=True), ChannelKey(4, 2, 2)]
)
@pytest.mark.parametrize("broken", [float("inf"), float("-inf"), float("nan")])
def test_broken_rows_stay_broken_and_others_whole(scheme, broken):
    """The bounds of a step would make a number of an infinite one."""
    rows = states(1, 1, 4, 8, dtype=torch.float32)
    rows[0, 0, 1, 3] = broken
    for out in (scheme.keys(rows, 0, torch.zeros(1, 1)), scheme.values(rows, 0, torch.zeros(1, 1))):
        assert not out[0, 0, 1, 3].isfinite()
        assert out[0, 0, 2:].isfinite().all()


@pytest.mark.parametrize(("group", "width"), [(4, 10), (16, 10), (32, 8)])
def test_channel_key(group, width):
    """Keys: a channel of `group` tokens. Values: `group` channels of a token, a shorter last group, or all of them."""
    rows = states(2, 2, 2 * group, width)
    scheme = ChannelKey(3, group, group)
    keys, values = scheme.keys(rows, 0, torch.zeros(1, 1)), scheme.values(rows, 0, torch.zeros(1, 1))
    for b, h, first, channel in [(0, 0, 0, 0), (1, 1, group, 7), (0, 1, group, 3)]:
        expected = by_hand(rows[b, h, first : first + group, channel].tolist(), 3)
        assert keys[b, h, first : first + group, channel].tolist() == pytest.approx(expected, abs=1e-12)
    for b, h, t in [(0, 0, 0), (1, 1, group)]:
        parts = [rows[b, h, t, at : at + group].tolist() for at in range(0, width, group)]
        expected = [number for part in parts for number in by_hand(part, 3)]
        assert values[b, h, t].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_rope_is_undone_and_redone(family):
    """Against the keys that the model's own projection makes, seen by a hook before any rotation."""
    model = build_model(family, dtype=torch.float64)
    rotary = find_rotary(model)
    assert all(rotary.rotates) if family not in {"opt", "gpt2"} else rotary.module is None
    named = {"gemma3": "k_norm", "qwen3": "k_norm", "gpt2": "c_attn", "phi3": "qkv_proj"}.get(family, "k_proj")
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, out: seen.append(out))
        for name, module in model.named_modules()
        if name.endswith(f".{named}")
    ]
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        run_with_cache(model, cache := CountingCache(), ids)
    layers = cache.layers
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers) == 3
    for number, (layer, out) in enumerate(zip(layers, seen, strict=True)):
        heads, width = layer.keys.shape[1], layer.keys.shape[3]
        if out.ndim == 3:
            begin = {"gpt2": 64, "phi3": 64}.get(family, 0)
            flat = out[..., begin : begin + heads * width]
            out = flat.unflatten(-1, (heads, width))  # noqa: PLW2901
        if out.shape[1] == 9:
            out = out.transpose(1, 2)  # noqa: PLW2901
        kept = layer.keys.shape[2]  # a sliding layer holds its last rows
        turn = rotary.at(torch.arange(9 - kept, 9)[None], number, layer.keys)
        expected = out[:, :, -kept:]
        torch.testing.assert_close(turn.undo(layer.keys), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(turn.do(turn.undo(layer.keys)), layer.keys)


def test_partial_rotation_is_undone():
    torch.manual_seed(0)
    model = Phi3ForCausalLM(
        Phi3Config(**SMALL, intermediate_size=64, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    ).eval()  # fmt: skip
    rotary = find_rotary(model)
    keys = states(1, 4, 6, 16, dtype=torch.float32)
    turn = rotary.at(torch.arange(6)[None], 0, keys)
    assert turn.cos.shape[-1] == 8
    assert torch.equal(turn.do(keys)[..., 8:], keys[..., 8:])
    torch.testing.assert_close(turn.undo(turn.do(keys)), keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotations_are_recognized_in_16_bits(dtype):
    assert all(all(find_rotary(build_model(family, dtype=dtype)).rotates) for family in ("llama", "gemma3", "qwen3"))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_pre_rope(family):
    """Keys by their channel's calibrated range, values by the token's over all heads, each to the nearest level."""
    model = build_model(family, dtype=torch.float64)
    levels = levels_of(model, (BOS,), 1)
    scheme = PreRope(levels, model)
    heads, width = levels.low[0].shape
    keys = 3 * states(2, heads, 7, width)
    positions = torch.tensor([[0, 1, 2, 3, 40, 41, 42], [5, 6, 7, 8, 9, 90, 91]])
    for layer in (0, 2):
        found = scheme.keys(keys, layer, positions)
        turn = scheme.rotary.at(positions, layer, keys)
        plain, fake = turn.undo(keys), turn.undo(found)
        table = levels.key_levels[layer].double()
        for b, h, t, d in [(0, 0, 0, 0), (1, heads - 1, 6, width - 1), (0, 1, 4, 5)]:
            low, high = float(levels.low[layer][h, d]), float(levels.high[layer][h, d])
            choices = low + (table + 1) / 2 * (high - low)
            expected = choices[(choices - plain[b, h, t, d]).abs().argmin()]
            assert float(fake[b, h, t, d]) == pytest.approx(float(expected), abs=1e-5)
        values = scheme.values(keys, layer, positions)
        token = keys[1, :, 3].flatten()
        choices = token.min() + (levels.value_levels[layer].double() + 1) / 2 * (token.max() - token.min())
        nearest = choices[(choices[:, None] - token).abs().argmin(dim=0)]
        torch.testing.assert_close(values[1, :, 3].flatten(), nearest, rtol=0, atol=1e-6)


def test_kept_rows_are_left_alone_in_both():
    rows = states(1, 2, 5, 8, dtype=torch.float32)
    keys, values = KVQuantizer(TokenHead(2), keep=2).write(rows, rows + 1, 0, torch.arange(5)[None])
    assert torch.equal(keys[:, :, :2], rows[:, :, :2])
    assert torch.equal(values[:, :, :2], rows[:, :, :2] + 1)
    assert not torch.equal(keys[:, :, 2:], rows[:, :, 2:])


def test_levels_that_do_not_fit_are_refused(llama):
    four = levels_of(llama, (BOS,), 1, bits=4)
    asked = KVSpec(bits=3, scheme="pre_rope", codebook="x")
    for levels in (None, four):
        with pytest.raises(ConfigError, match="needs a codebook of 3 bits"):
            kv_quantizer_of(asked, llama, levels)
    llama.model.layers = llama.model.layers[:2]
    llama.config.num_hidden_layers = 2
    with pytest.raises(ConfigError, match="of 3 layers, this model has 2"):
        kv_quantizer_of(asked.model_copy(update={"bits": 4}), llama, four)
