"""Generation from an empty prompt: options act on the first token too, and the pivot's rows and logits are the captured ones."""

import pytest
import torch
from helpers.kv_cells import pivoted as cell_on
from helpers.kv_cells import spec
from helpers.tiny import BOS, EOS, PAD, build_model

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.errors import NumericsError
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.pivot.capture import capture, fingerprint_of

KV = {"kv16": KVSpec(), "kv3": KVSpec(bits=3), "groups": spec("channel_key")}
OPTIONS = {"do_sample": False, "pad_token_id": PAD}


def batch(*bodies):
    longest = max(map(len, bodies))
    ids = torch.tensor([[PAD] * (longest - len(body)) + list(body) for body in bodies], dtype=torch.long)
    return ids, torch.tensor([[0] * (longest - len(b)) + [1] * len(b) for b in bodies], dtype=torch.long)


def behind_nothing(made, tokens, **options):
    """What empty prompts go on with, alone and beside a text."""
    alone = generate(made, *batch([]), tokens, **OPTIONS, **options)[0].tolist()
    both = generate(made, *batch([], [40, 41, 42]), tokens, **OPTIONS, **options)
    assert both[0, 3 : 3 + len(alone)].tolist() == alone
    other = generate(made, *batch([40, 41, 42]), tokens, **OPTIONS, **options)[0].tolist()
    assert both[1, : len(other)].tolist() == other
    return alone


@pytest.mark.parametrize(
    "options", [{}, {"suppress_tokens": True}, {"num_beams": 4}, {"repetition_penalty": 5.0}, {"min_new_tokens": 6}], ids=str
)  # fmt: skip
@pytest.mark.parametrize("tokens", [(BOS,), (BOS, 7, 9)], ids=len)
@pytest.mark.parametrize("intact", [True, False], ids=["intact", "computed"])
def test_options_act_as_behind_any_text(tokens, intact, options):
    model = build_model("llama")
    ids = torch.tensor([tokens])
    first = int(model(ids).logits[0, -1].argmax())
    if "suppress_tokens" in options:
        options = {"suppress_tokens": [first]}
    if "min_new_tokens" in options:
        with torch.no_grad():
            model.lm_head.weight[EOS] = model.lm_head.weight[first] * 1.5
    expected = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **OPTIONS, **options
    )[0, len(tokens) :].tolist()  # fmt: skip
    assert behind_nothing(cell_on(model, tokens, intact, KVSpec()), 8, **options) == expected


@pytest.mark.parametrize("intact", [True, False], ids=["intact", "computed"])
@pytest.mark.parametrize("kv", KV.values(), ids=KV)
@pytest.mark.parametrize("tokens", [(BOS,), (BOS, 7, 9)], ids=len)
def test_tokens_are_those_of_one_forward_for_each(model, tokens, kv, intact):
    """Also where another model, the full-precision one, was captured."""
    source = build_model(model.config.model_type.removesuffix("_text"), seed=1)
    pivot = capture(source, tokens, fingerprint_of(source, "main")) if intact else None
    made = PivotedModel(model, tokens, pivot, kv)
    expected = []
    for _ in range(5):
        logits = made.logits(torch.tensor([[*tokens, *expected]]))[0, -1].clone()
        logits[17] = -torch.inf
        expected.append(int(logits.argmax()))
        if expected[-1] == EOS:
            break
    assert behind_nothing(made, 5, suppress_tokens=[17]) == expected
    assert not made.model._forward_hooks


def test_broken_logits_are_found(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    made = PivotedModel(llama, (BOS,), None)
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.down_proj\.weight"):
        generate(made, *batch([]), 3, **OPTIONS)
    assert not llama._forward_hooks
