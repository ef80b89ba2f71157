"""Law 16, KV cache: a formula that bears a paper's name is the released one, bit for bit.

The fixture holds what the released code of IntactKV, QuaRot and KIVI makes of the same rows (tests/fixtures/released/make_kv.py).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad, scaled_dot_product_attention

from intactkv_eval.kv_cache.grouped import SideBySideCache, StreamCache, TokenGroups
from intactkv_eval.kv_quant.channel_key import ChannelKey
from intactkv_eval.kv_quant.token_head import TokenHead, quarot_rows
from intactkv_eval.weights.hadamard import hadamard_rows

ROOT = Path(__file__).parents[2]
RELEASED = load_file(ROOT / "tests/fixtures/released/kv.safetensors")
PLACES = torch.zeros(1, 1)
GROUP, RESIDUAL, TOKENS, PROMPT = 8, 16, 44, 12
BITS = (2, 3, 4, 8)


def float_minimum(rows, bits):
    """What `token_head` was before: the minimum is kept as it is, so that zero is no level."""
    low, high = rows.amin(dim=-1, keepdim=True), rows.amax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.round((rows - low) / step) * step + low


@pytest.mark.parametrize("bits", BITS)
def test_token_head_is_intactkvs_quantizer(bits):
    rows, scheme = RELEASED["token_head.rows"], TokenHead(bits)
    assert torch.equal(scheme.keys(rows, 0, PLACES), RELEASED[f"token_head.{bits}"])
    assert torch.equal(scheme.values(rows, 0, PLACES), RELEASED[f"token_head.{bits}"])


@pytest.mark.parametrize("bits", BITS)
def test_a_float_minimum_is_another_formula(bits):
    usual = RELEASED["token_head.rows"][:, :, :8]
    differ = float_minimum(usual, bits) != RELEASED[f"token_head.{bits}"][:, :, :8]
    assert differ.float().mean() > 0.5


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
def test_in_16_bits_ours_is_fp32_arithmetic_rounded(dtype, steps):
    """The released code computes in 16 bits: few numbers (`steps`) are another code, all are within one step."""
    rows = RELEASED["token_head.rows"][:, :, :8].to(dtype)
    name = str(dtype).removeprefix("torch.")
    ours = TokenHead(4).keys(rows, 0, PLACES)
    assert torch.equal(ours, TokenHead(4).keys(rows.float(), 0, PLACES).to(dtype))
    step = (rows.float().amax(dim=-1, keepdim=True) - rows.float().amin(dim=-1, keepdim=True)) / 15
    off = (ours.float() - RELEASED[f"token_head.{name}.4"]).abs() / step
    assert off.max() < 1.01
    assert (off > 0.5).float().mean() < steps


@pytest.mark.parametrize("clip", [1.0, 0.95])
@pytest.mark.parametrize("bits", BITS)
def test_quarots_keys(bits, clip):
    rows, expected = RELEASED["quarot.rows"], RELEASED[f"quarot.keys.{bits}.{clip:g}"]
    turned = hadamard_rows(rows)
    assert torch.equal(turned, RELEASED["quarot.turned"])
    assert torch.equal(quarot_rows(turned, bits, clip, with_zero=True), expected)
    back = TokenHead(bits, rotate=True, clip=clip).keys(rows, 0, PLACES)  # not turned: QuaRot turns the queries too
    torch.testing.assert_close(hadamard_rows(back), expected, rtol=0, atol=1e-5)
    if clip < 1:  # without the transform
        assert torch.equal(TokenHead(bits, clip=clip).keys(turned, 0, PLACES), expected)


@pytest.mark.parametrize("clip", [1.0, 0.95])
@pytest.mark.parametrize("bits", BITS)
def test_quarots_values_in_groups_of_head_dim(bits, clip):
    rows = RELEASED["quarot.rows"].clone()
    rows[:, :, 8] = rows[:, :, 0]
    expected = RELEASED[f"quarot.values.{bits}.{clip:g}"].unflatten(-1, (2, 64)).transpose(1, 2)
    assert torch.equal(TokenHead(bits, rotate=True, clip=clip).values(rows, 0, PLACES), expected)
    assert not torch.equal(quarot_rows(rows, bits, clip, with_zero=True), expected), "values have no zero in the range"


def test_equal_values_of_which_quarot_makes_nan_are_left_alone():
    assert RELEASED["quarot.values.equal"].isnan().all()
    equal = torch.full((1, 1, 1, 64), 0.3)
    assert torch.equal(TokenHead(4, rotate=True).values(equal, 0, PLACES), equal)


def streamed(bits, tokens):
    """A cache of so many of KIVI's rows, written one at a time, as the next token sees it."""
    cache = StreamCache([], 1, ChannelKey(bits, GROUP, RESIDUAL), TokenGroups(0, RESIDUAL))
    rows = [pad(RELEASED[name], (0, 0, 0, 1)) for name in ("kivi.keys", "kivi.values")]
    for column in range(tokens + 1):
        seen = cache.update(*(part[:, :, column : column + 1] for part in rows), 0)
    return [part[:, :, :-1] for part in seen]


def test_which_rows_kivi_quantizes():
    groups = TokenGroups(0, RESIDUAL)
    full = [RELEASED["kivi.keys"], RELEASED["kivi.values"]]
    for tokens, quantized in enumerate(RELEASED["kivi.lengths"].tolist()):
        assert list(groups.boundaries(tokens)) == quantized
        assert list(TokenGroups(3, RESIDUAL).boundaries(3 + tokens)) == [3 + count for count in quantized]
        for part, rows, count in zip(streamed(2, tokens), full, quantized, strict=True):
            same = (part == rows[:, :, :tokens]).all(dim=-1).all(dim=1)[0]
            assert same[count:].all()
            assert not same[:count].any()


@pytest.mark.parametrize("bits", [2, 4])
def test_kivis_cache(bits):
    keys, values = streamed(bits, TOKENS)
    assert torch.equal(keys, RELEASED[f"kivi.{bits}.keys"])
    assert torch.equal(values, RELEASED[f"kivi.{bits}.values"])


@pytest.mark.parametrize("bits", [2, 4])
def test_what_a_query_sees_of_kivis_cache(bits):
    """All queries at once, by a mask, against KIVI's own attention decoding one token after the other."""
    groups = TokenGroups(0, RESIDUAL)
    cache = SideBySideCache([], 1, ChannelKey(bits, GROUP, RESIDUAL), groups)
    keys, values = cache.update(RELEASED["kivi.keys"], RELEASED["kivi.values"], 0)
    mask = groups.mask(0, TOKENS, None, torch.float32)
    seen = scaled_dot_product_attention(RELEASED["kivi.queries"], keys, values, attn_mask=mask)
    seen = seen.transpose(1, 2).flatten(2)[0, PROMPT:]
    torch.testing.assert_close(seen, RELEASED[f"kivi.{bits}.seen"], rtol=0, atol=2e-6)
    rows = [RELEASED[f"kivi.{name}"] for name in ("queries", "keys", "values")]
    full = scaled_dot_product_attention(*rows, is_causal=True)
    assert (full.transpose(1, 2).flatten(2)[0, PROMPT:] - seen).abs().max() > 1e-3


def test_the_page_shows_the_released_perplexities():
    measured = json.loads((ROOT / "tests/fixtures/released/kv_perplexity.json").read_text())["rows"]
    lines = (ROOT / "docs/released-formulas.md").read_text().splitlines()
    for row in [row for row in measured if row["kv_bits"] < 16]:
        begin = f"| {row['weights'].replace('4 g', '4g')} | {row['kv_bits']} | {row['pivot']} |"
        shown = [line for line in lines if line.startswith(begin)]
        assert len(shown) == 1
        assert shown[0].endswith(f" {row['perplexity']:.4f} |")
