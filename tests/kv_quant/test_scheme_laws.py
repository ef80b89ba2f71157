"""Laws 2 and 4 on caches of every scheme, and what the switches of exempt rows do."""

import pytest
import torch
from helpers.kv_cells import pivoted, spec
from helpers.tiny import BOS, FAMILIES, PAD, build_model

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel

TOKENS = (BOS, 7)
SCHEMES = ("token_head", "channel_key", "pre_rope")
BODY = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(1))
OPTIONS = {"do_sample": False, "pad_token_id": PAD}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def rows_after(made):
    """Keys and values of each layer behind a prefill and some steps."""
    ids = torch.cat([torch.tensor([TOKENS] * 2), BODY], dim=1)
    with torch.no_grad():
        if made.kv_quantizer.in_groups:
            cache = made.prefilled(ids)
            run_with_cache(made.model, cache, BODY[:, -1:])
        else:
            cache = made.new_cache(2)
            run_with_cache(made.model, cache, ids[:, cache.get_seq_length() :])
    return cache.layers


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_law_2_exempt_rows_stay_exact(family, scheme):
    model = build_model(family)
    if model.config.get_text_config().to_dict().get("sliding_window"):
        model.config.sliding_window = 64  # so that every layer holds its first rows
    made = pivoted(model, TOKENS, True, spec(scheme))
    for layer, keys, values in zip(rows_after(made), made.pivot.keys, made.pivot.values, strict=True):
        for row in range(2):
            assert torch.equal(layer.keys[row, :, : len(TOKENS)], keys)
            assert torch.equal(layer.values[row, :, : len(TOKENS)], values)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_pivot_rows_are_quantized_too_where_asked(family, scheme):
    model = build_model(family, dtype=torch.float64)
    made = pivoted(model, TOKENS, True, spec(scheme, quantize_pivot=True))
    exempt = pivoted(model, TOKENS, True, spec(scheme))
    for layer, keys in zip(rows_after(made), made.pivot.keys, strict=True):
        assert not torch.isclose(layer.keys[0, :, : len(TOKENS)], keys).all(dim=-1).any()
    assert (made.body_logits(BODY) - exempt.body_logits(BODY)).abs().max() > 1e-3
    # They are the full-precision model's rows, as the cache would have written them.
    full = pivoted(model, TOKENS, False, spec(scheme))
    torch.testing.assert_close(full.body_logits(BODY), made.body_logits(BODY)) if scheme == "channel_key" else None
    if scheme != "channel_key":
        root = SharedModel(made).root.rows
        for (keys, _), own in zip(root, made.front_rows.keys, strict=True):
            assert torch.equal(keys[0], own)


@pytest.mark.parametrize("intact", [True, False], ids=["intact", "computed"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_law_4_left_and_right_padded(family, scheme, intact):
    made = pivoted(build_model(family, dtype=torch.float64), TOKENS, intact, spec(scheme))
    bodies = [BODY[0, :4], BODY[1, :15], BODY[0, :9]]
    padded = torch.stack([torch.cat([body, torch.full((15 - len(body),), PAD)]) for body in bodies])
    together = made.body_logits(padded)
    for row, body in enumerate(bodies):
        alone = made.body_logits(body[None])[0]
        torch.testing.assert_close(together[row, : len(body)], alone, rtol=1e-6, atol=1e-6)
    ids = torch.stack([torch.cat([torch.full((15 - len(body),), PAD), body]) for body in bodies])
    out = generate(made, ids, (ids != PAD).long(), 4, **OPTIONS)[:, 15:]
    for row, body in enumerate(bodies):
        alone = generate(made, body[None], torch.ones(1, len(body)), 4, **OPTIONS)[0, len(body) :]
        assert out[row, : len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_eight_bits_are_close_to_none_and_two_are_not(family, scheme):
    model = build_model(family, dtype=torch.float64)
    plain = pivoted(model, TOKENS, True, spec("token_head")).pivot
    exact = PivotedModel(model, TOKENS, plain).body_logits(BODY)
    size = exact.std()
    cells = [pivoted(model, TOKENS, True, spec(scheme, bits), texts=[*BODY]) for bits in (8, 2)]
    errors = [(cell.body_logits(BODY) - exact).std() / size for cell in cells]
    assert errors[0] < 0.05
    assert errors[1] > 4 * errors[0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "qwen3"])
def test_a_kept_start_and_kept_turns_of_pre_rope(family):
    made = pivoted(build_model(family, dtype=torch.float64), TOKENS, True, spec("pre_rope"))
    starts = PrefixCache(SharedModel(made))
    ids = torch.cat([BODY[:1].expand(2, -1), torch.tensor([[PAD, 5, 6], [9, 8, 7]])], dim=1)
    ids[0] = torch.cat([ids[0, 21:22], ids[0, :21], ids[0, 22:]])
    mask = (ids != PAD).long()
    expected = generate(made, ids, mask, 5, **OPTIONS)
    with starts.turns_kept():
        assert torch.equal(generate(made, ids, mask, 5, None, starts, **OPTIONS), expected)
        turned = torch.cat([expected[1:], torch.tensor([[4, 5]])], dim=1)
        plain = generate(made, turned, torch.ones_like(turned), 5, **OPTIONS)
        assert torch.equal(generate(made, turned, torch.ones_like(turned), 5, None, starts, **OPTIONS), plain)
    assert starts.computed == 1
