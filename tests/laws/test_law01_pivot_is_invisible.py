"""Law 1: the full-precision pivot in the full-precision model is the plain model with those tokens in front."""

import pytest
import torch
from helpers.tiny import BOS, WINDOW

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.pivot.capture import capture, fingerprint_of

PIVOTS = {"bos": (BOS,), "five": (BOS, 10, 20, 30, 40), "longer than the window": (BOS, *range(40, 40 + WINDOW + 3))}


def pivoted(model, tokens, kv=None):
    return PivotedModel(model, tokens, capture(model, tokens, fingerprint_of(model, "main")), kv)


@pytest.mark.parametrize("tokens", PIVOTS.values(), ids=PIVOTS)
def test_logits_are_the_plain_models(model, tokens):
    body = torch.randint(0, 256, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(1))
    front = torch.tensor([tokens] * 2)
    with torch.no_grad():
        plain = model(torch.cat([front, body], dim=1)).logits
    torch.testing.assert_close(pivoted(model, tokens).body_logits(body), plain[:, len(tokens) :])
    torch.testing.assert_close(pivoted(model, tokens).pivot_logits, plain[0, : len(tokens)])


@pytest.mark.parametrize("tokens", PIVOTS.values(), ids=PIVOTS)
def test_greedy_tokens_are_the_plain_models(model, tokens):
    body = torch.randint(0, 256, (1, 7), generator=torch.Generator().manual_seed(2))
    whole = torch.cat([torch.tensor([tokens]), body], dim=1)
    plain = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=2 * WINDOW, do_sample=False)
    ours = generate(pivoted(model, tokens), body, torch.ones_like(body), 2 * WINDOW, do_sample=False)
    assert ours[0].tolist() == plain[0, len(tokens) :].tolist()


def test_a_wrong_pivot_is_visible(model):
    """The test above can fail: KV of another token in front changes the logits."""
    body = torch.randint(0, 256, (1, 6))
    right = pivoted(model, (BOS,)).body_logits(body)
    wrong = pivoted(model, (65,)).body_logits(body)
    assert (right - wrong).abs().max() > 1e-2


def test_quantized_kv_at_prefill_changes_logits(model):
    """KV quantization acts when a prompt is scored, not only when tokens are generated."""
    body = torch.randint(0, 256, (1, 12))
    exact = pivoted(model, (BOS,)).body_logits(body)
    coarse = pivoted(model, (BOS,), KVSpec(bits=2)).body_logits(body)
    assert (exact - coarse).abs().max() > 1e-3
