"""channel_key: scoring, prefill in chunks and one token at a time see the same cache; against decoding written here."""

import logging

import pytest
import torch
from helpers.kv_cells import CHANNEL_KEY, pivoted
from helpers.tiny import BOS, FAMILIES, PAD, build_model
from transformers import BloomConfig, BloomForCausalLM

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference import pivoted_model
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.grouped_kv_probe import check_groups
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel, Sharing
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import Counts, score
from intactkv_eval.kv_cache.grouped import TokenGroups

TOKENS = (BOS, 7, 30)
GROUP = 4
CELLS = {
    "intact": (True, KVSpec(bits=2, **CHANNEL_KEY)),
    "intact, pivot too": (True, KVSpec(bits=2, **CHANNEL_KEY, quantize_pivot=True)),
    "computed": (False, KVSpec(bits=2, **{**CHANNEL_KEY, "group_size": 3, "residual_length": 3})),
    "computed, keep 2": (False, KVSpec(bits=2, **{**CHANNEL_KEY, "residual_length": 8}, sink_tokens=2)),
}
BODY = torch.randint(0, 256, (23,), generator=torch.Generator().manual_seed(3))
OPTIONS = {"do_sample": False, "pad_token_id": PAD}


def rounded(rows, bits, dim):
    low, high = rows.min(dim=dim, keepdim=True).values, rows.max(dim=dim, keepdim=True).values
    step = (high - low) / (2**bits - 1)
    return torch.where(step > 0, low + ((rows - low) / step).round() * step, rows)


def as_stored(keys, values, column, exempt, kv):
    """What a query in `column` sees of full rows [1, H, S, D]."""
    older = max(column - exempt, 0)
    keys, values = keys.clone(), values.clone()
    for first in range(exempt, exempt + older - older % kv.residual_length, kv.group_size):
        block = slice(first, first + kv.group_size)
        keys[:, :, block] = rounded(keys[:, :, block], kv.bits, 2)
    block = slice(exempt, max(exempt, exempt + older - kv.residual_length))
    for at in range(0, values.shape[3], kv.group_size):
        values[:, :, block, at : at + kv.group_size] = rounded(values[:, :, block, at : at + kv.group_size], kv.bits, 3)
    return keys, values


@torch.no_grad()
def decoded(made, ids, exempt):
    """Logits of `ids`, one token after the other, each behind a cache made anew of the full rows."""
    pivot = made.pivot
    full = [] if pivot is None else [(k[None], v[None]) for k, v in zip(pivot.keys, pivot.values, strict=True)]
    logits = []
    for token in ids.tolist():
        column = full[0][0].shape[2] if full else 0
        cache = CountingCache()
        for layer, (keys, values) in enumerate(full):
            cache.update(*as_stored(keys, values, column, exempt, made.kv), layer)
        logits.append(run_with_cache(made.model, cache, torch.tensor([[token]])).logits[0, -1])
        new = [(layer.keys[:, :, -1:], layer.values[:, :, -1:]) for layer in cache.layers]
        old = full or [(k[:, :, :0], v[:, :, :0]) for k, v in new]
        full = [
            (torch.cat([a, c], 2), torch.cat([b, d], 2)) for (a, b), (c, d) in zip(old, new, strict=True)
        ]  # fmt: skip
    return torch.stack(logits)


EXEMPT = {"intact": 3, "intact, pivot too": 0, "computed": 0, "computed, keep 2": 2}


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_scoring_is_decoding(family, cell, monkeypatch):
    monkeypatch.setattr(pivoted_model, "_PIECE", 5)  # so that prompts are computed in several
    made = pivoted(build_model(family, dtype=torch.float64), TOKENS, *CELLS[cell])
    front = 0 if made.pivot is not None else len(TOKENS)
    whole = torch.cat([torch.tensor(TOKENS), BODY])
    expected = decoded(made, whole[len(TOKENS) - front :], EXEMPT[cell])
    plain = PivotedModel(made.model, TOKENS, made.pivot).body_logits(BODY[None])[0]
    if made.window is None or made.kv.residual_length < made.window:
        assert (expected[front:] - plain).abs().max() > 1e-2, "quantization is to be seen"
    padded = torch.full((3, len(BODY)), PAD)
    for row, length in enumerate((len(BODY), 5, 14)):
        padded[row, :length] = BODY[:length]
    scored = made.body_logits(padded)
    for row, length in enumerate((len(BODY), 5, 14)):
        torch.testing.assert_close(scored[row, :length], expected[front : front + length], rtol=1e-9, atol=1e-9)
    for length in (1, 6, 13):  # generation: all but the last of so many tokens at once, then one by one
        cache = made.prefilled(torch.cat([torch.tensor(TOKENS), BODY[:length]])[None])
        for place in range(length - 1, len(BODY)):
            with torch.no_grad():
                step = run_with_cache(made.model, cache, BODY[None, place : place + 1]).logits[0, -1]
            torch.testing.assert_close(step, expected[front + place], rtol=1e-9, atol=1e-9)
    if made.pivot is None:
        torch.testing.assert_close(made.pivot_logits, expected[:front], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", ["gemma3", "gpt2", "llama", "mistral"])
def test_generated_tokens_are_those_that_scoring_finds_greedy(family, cell):
    made = pivoted(build_model(family, dtype=torch.float64), TOKENS, *CELLS[cell])
    bodies = [BODY[:1], BODY[:13], BODY[:6]]
    ids = torch.stack([torch.cat([torch.full((13 - len(body),), PAD), body]) for body in bodies])
    out = generate(made, ids, (ids != PAD).long(), 9, **OPTIONS)
    for body, row in zip(bodies, out[:, 13:], strict=True):
        new = row[row != PAD]
        logits = made.body_logits(torch.cat([body, new])[None])[0, len(body) - 1 : -1]
        assert logits.argmax(dim=-1).tolist() == new.tolist()
    beams = generate(made, ids, (ids != PAD).long(), 5, num_beams=3, **OPTIONS)
    alone = generate(made, BODY[None, :6], torch.ones(1, 6), 5, num_beams=3, **OPTIONS)[0, 6:]
    assert beams[2, 13 : 13 + len(alone)].tolist() == alone.tolist()


def test_eager_attention():
    model = build_model("gemma3", dtype=torch.float64)
    expected = pivoted(model, TOKENS, *CELLS["intact"]).body_logits(BODY[None])
    model.set_attn_implementation("eager")
    torch.testing.assert_close(
        pivoted(model, TOKENS, *CELLS["intact"]).body_logits(BODY[None]), expected, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(("exempt", "residual"), [(0, 4), (3, 4), (2, 9)])
def test_every_query_sees_one_copy_of_each_row_before_it(exempt, residual):
    """Whole or in pieces, with a window or without: of each older column the copy that its age says, and no other."""
    groups = TokenGroups(exempt, residual)
    for first, total in [(0, 1), (0, 30), (3, 30), (9, 13), (17, 30), (29, 30)]:
        quantized, mixed, full = (list(range(part.start, part.stop)) for part in groups.copies(first, total))
        columns = [*quantized, *mixed, *range(min(exempt, total)), *full]
        for window in (None, 6):
            seen = groups.mask(first, total, window, torch.float32)[0, 0] == 0
            assert seen.shape == (total - first, len(columns))
            for query, row in enumerate(seen.tolist(), start=first):
                assert sorted(column for column, there in zip(columns, row, strict=True) if there) == list(
                    range(0 if window is None else max(0, query - window + 1), query + 1)
                )
                keys_to, values_to = groups.boundaries(query)
                for place, there in enumerate(row):
                    column, kind = columns[place], (place >= len(quantized)) + (place >= len(quantized) + len(mixed))
                    old = column >= exempt
                    expected = 0 if old and column < values_to else 1 if old and column < keys_to else 2
                    assert not there or kind == expected


def test_a_prefill_across_a_boundary_is_not_taken():
    made = pivoted(build_model("llama"), TOKENS, *CELLS["intact"])
    cache = made.prefilled(torch.tensor([[*TOKENS, 5]]))
    with pytest.raises(AssertionError, match="do not see the same rows"):
        run_with_cache(made.model, cache, BODY[None])


def test_nothing_is_shared_and_it_is_said_once(caplog):
    caplog.set_level(logging.INFO)
    made = pivoted(build_model("llama", dtype=torch.float64), TOKENS, *CELLS["intact"])
    shared, counts = SharedModel(made), Counts()
    head = BODY[:18].tolist()
    requests = [Request([*head, 5], [6]), Request([*head, 9, 9], [6, 7]), Request([], [3])]
    found = score(shared, requests, lambda tokens: 3, counts=counts)
    again = [score(shared, [request], lambda tokens: 1)[0] for request in requests]
    assert [one.log_likelihood for one in found] == pytest.approx([one.log_likelihood for one in again], abs=1e-9)
    assert counts.sharing == "nothing"
    assert len([record for record in caplog.records if "not shared" in record.message]) == 1
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    starts = PrefixCache(shared)
    with starts.turns_kept():
        assert starts.turns is None
        assert starts.of([[*head, 1], [*head, 2]]) is None
    assert shared.sharing is Sharing.NOTHING


def test_models_are_tried(monkeypatch):
    kv = CELLS["intact"][1]
    for family in sorted(FAMILIES):
        check_groups(pivoted(build_model(family), TOKENS, True, kv))
    check_groups(pivoted(build_model("llama", dtype=torch.bfloat16), TOKENS, False, kv))
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3))
    with pytest.raises(UnsupportedModelError, match="channel_key is not possible with BloomForCausalLM"):
        check_groups(PivotedModel(bloom.eval(), TOKENS, None, kv))
    made = pivoted(build_model("llama"), TOKENS, True, kv)
    right = TokenGroups.mask
    monkeypatch.setattr(TokenGroups, "mask", lambda self, first, total, *rest: right(self, first, total, *rest) * 0)
    with pytest.raises(UnsupportedModelError, match="other logits"):
        check_groups(made)
