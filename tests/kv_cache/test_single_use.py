"""A cache for one forward: the same logits as with PivotCache, and nothing but the pivot's rows stays behind."""

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, build_model

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.kv_cache.single_use import SingleForwardCache
from intactkv_eval.model.structure import layer_devices
from intactkv_eval.pivot.capture import capture, fingerprint_of


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_forward_is_the_same_and_the_rows_are_let_go(family):
    model = build_model(family)
    pivot = capture(model, (BOS, 7), fingerprint_of(model, "main"))
    ids = torch.arange(40)[None] % 250
    logits = []
    for kind in (PivotCache, SingleForwardCache):
        cache = kind(model.config, 1, None, pivot, layer_devices(model))
        with torch.no_grad():
            logits.append(run_with_cache(model, cache, ids).logits)
    assert torch.equal(*logits)
    for layer, keys, values in zip(cache.layers, pivot.keys, pivot.values, strict=True):
        assert torch.equal(layer.keys[0], keys)
        assert torch.equal(layer.values[0], values)
    assert cache.get_seq_length() == 2
