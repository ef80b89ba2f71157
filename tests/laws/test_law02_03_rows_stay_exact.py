"""Law 2: pivot rows in the cache are the captured ones after any use. Law 3: a PivotKV is never changed by use."""

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, WINDOW, build_model

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.transformers_api import Cache
from intactkv_eval.inference import pivoted_model as pivoted_module
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import score
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.kv_quant.quantizer import kv_quantizer_of
from intactkv_eval.pivot.capture import capture, fingerprint_of

TOKENS = (BOS, 7, 9)


@pytest.fixture
def made(model):
    pivot = capture(model, TOKENS, fingerprint_of(model, "main"))
    return PivotedModel(model, TOKENS, pivot, KVSpec(bits=3))


def assert_rows_exact(cache, pivot):
    for layer, key, value in zip(cache.layers, pivot.keys, pivot.values, strict=True):
        for row in range(layer.keys.shape[0]):
            assert torch.equal(layer.keys[row, :, : len(pivot)], key)
            assert torch.equal(layer.values[row, :, : len(pivot)], value)


def test_after_a_forward_and_a_second_one(made):
    cache = made.new_cache(2)
    with torch.no_grad():
        run_with_cache(made.model, cache, torch.randint(0, 256, (2, 2)))
        run_with_cache(made.model, cache, torch.randint(0, 256, (2, 1)))
    assert_rows_exact(cache, made.pivot)
    body = cache.layers[0].keys[0, :, len(TOKENS) :]
    assert len(body[0, 0].unique()) <= 2**3, "body rows are quantized"


def test_after_generate(made, monkeypatch):
    caches = []
    fresh = PivotedModel.new_cache
    monkeypatch.setattr(
        PivotedModel, "new_cache", lambda self, n, padding: caches.append(fresh(self, n, padding)) or caches[-1]
    )
    body = torch.randint(0, 256, (2, 2))
    generate(made, body, torch.ones_like(body), 2, do_sample=False)
    assert len(caches) == 1
    assert_rows_exact(caches[0], made.pivot)


@pytest.mark.parametrize("bits", [16, 3])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_long_bodies_see_the_same_rows(family, bits, monkeypatch):
    """Pivot tokens computed again, by a model that is not the pivot's own, have their rows replaced."""
    model, other = (build_model(family, seed, torch.float64) for seed in (0, 1))
    made = PivotedModel(model, TOKENS, capture(other, TOKENS, fingerprint_of(other, "main")), KVSpec(bits=bits))
    body = torch.randint(0, 256, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(3))
    assert made.lead(body.shape[1]) == 0
    expected = made.body_logits(body)
    monkeypatch.setattr(pivoted_module, "_LONG", 8)
    assert made.lead(body.shape[1]) == len(TOKENS)
    caches = []
    plain = made.model.forward
    monkeypatch.setattr(made.model, "forward", lambda **given: caches.append(given) or plain(**given))
    torch.testing.assert_close(made.body_logits(body), expected)
    assert caches[0]["input_ids"][:, : len(TOKENS)].tolist() == [list(TOKENS)] * 2
    for layer, key in zip(
        next(v for v in caches[0].values() if isinstance(v, Cache)).layers, made.pivot.keys, strict=True
    ):
        assert getattr(layer, "is_sliding", False) or torch.equal(layer.keys[1, :, : len(TOKENS)], key)
    requests = [Request(row[:-4], row[-4:]) for row in body.tolist()]
    found = score(SharedModel(made), requests, lambda tokens: 2, share=False)
    monkeypatch.setattr(pivoted_module, "_LONG", 10**6)
    for one, two in zip(found, score(SharedModel(made), requests, lambda tokens: 2, share=False), strict=True):
        assert one.log_likelihood == pytest.approx(two.log_likelihood, abs=1e-9)


def test_rows_share_no_storage(made):
    cache = made.new_cache(2)
    keys = cache.layers[0].keys
    keys[0] += 1
    assert torch.equal(keys[1], made.pivot.keys[0])


def test_a_pivot_is_never_changed(made):
    tensors = (*made.pivot.keys, *made.pivot.values, made.pivot.logits)
    before = [tensor.clone() for tensor in tensors]
    body = torch.randint(0, 256, (3, 9))
    made.body_logits(body)
    generate(made, body, torch.ones_like(body), 3, do_sample=False)
    for layer in made.new_cache(1).layers:
        layer.keys.zero_()
        layer.values.zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))


def test_kept_tokens_are_left_alone(llama):
    """kv_sink_tokens: the evaluated model's own first rows stay exact, counted from each row's first real token."""
    torch.manual_seed(0)
    states = torch.randn(2, 2, 5, 16)
    cache = PivotCache(
        llama.config, 2, kv_quantizer_of(KVSpec(bits=2, sink_tokens=2), llama), padding=torch.tensor([0, 1])
    )
    keys, _ = cache.update(states, states, 0)
    kept = (keys == states).all(dim=3).all(dim=1)
    assert kept[0].tolist() == [True, True, False, False, False]
    assert kept[1, 1:].tolist() == [True, True, False, False]
