"""A start that generation requests share is computed once, and the generated tokens are the same."""

import pytest
import torch
from tiny import BOS, FAMILIES, PAD, build_model

from intactkv_eval.config import KVSpec
from intactkv_eval.harness.generation import generate
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.shared import SharedModel, Sharing
from intactkv_eval.harness.shared_start import SharedStart
from intactkv_eval.pivot.capture import capture, fingerprint_of

TOKENS = (BOS, 7)
HEAD = [(37 * place) % 250 for place in range(1, 25)]
BODIES = [HEAD + rest for rest in ([3], [5, 9, 11, 200, 17], [90, 91, 92, 93, 41, 42, 43, 44])]
CELLS = {"intact": (True, KVSpec()), "computed": (False, KVSpec()), "computed kv3 keep 4": (False, KVSpec(bits=3, keep=4)),
         "intact kv3": (True, KVSpec(bits=3))}  # fmt: skip
OPTIONS = {"do_sample": False, "pad_token_id": PAD}


def pivoted(family, cell):
    intact, kv = CELLS[cell]
    model = build_model(family, dtype=torch.float64)
    pivot = capture(model, TOKENS, fingerprint_of(model, "main")) if intact else None
    return PivotedModel(model, TOKENS, pivot, kv)


def padded(bodies):
    longest = max(map(len, bodies))
    ids = torch.tensor([[PAD] * (longest - len(body)) + body for body in bodies])
    return ids, torch.tensor([[0] * (longest - len(body)) + [1] * len(body) for body in bodies])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_same_tokens_with_and_without_a_kept_start(family, cell):
    made = pivoted(family, cell)
    starts = SharedStart(SharedModel(made))
    ids, mask = padded(BODIES)
    expected = generate(made, ids, mask, 6, **OPTIONS)
    for _ in range(2):
        assert torch.equal(generate(made, ids, mask, 6, None, starts, **OPTIONS), expected)
    assert starts.computed == (0 if made.window else 1)
    beams = {**OPTIONS, "num_beams": 2}
    assert torch.equal(generate(made, ids, mask, 4, None, starts, **beams), generate(made, ids, mask, 4, **beams))


def test_one_row_at_a_time_finds_the_start_in_its_neighbours():
    made = pivoted("llama", "intact")
    starts = SharedStart(SharedModel(made))
    for body in [*BODIES, *BODIES]:
        ids, mask = padded([body])
        assert torch.equal(
            generate(made, ids, mask, 5, None, starts, **OPTIONS), generate(made, ids, mask, 5, **OPTIONS)
        )
    assert starts.computed == 1


def test_nothing_is_kept_where_little_is_shared_or_the_model_cannot(monkeypatch):
    made = pivoted("llama", "intact")
    starts = SharedStart(SharedModel(made))
    assert starts.of([[*HEAD[:10], 1, 2], [*HEAD[:10], 3]]) is None
    assert starts.of([[4, 5, 6]]) is None
    assert starts.of([HEAD[:3]]) is None
    monkeypatch.setattr(SharedModel, "sharing", Sharing.NOTHING)
    assert starts.of(BODIES) is None


def test_another_start_takes_the_place_of_the_kept_one():
    made = pivoted("llama", "intact")
    starts = SharedStart(SharedModel(made))
    other = [[9, *body] for body in BODIES]
    assert starts.of(BODIES).tokens == tuple(HEAD)
    assert starts.of(other) is None  # the row before them shares nothing with them
    assert starts.of(other).tokens == (9, *HEAD)
    assert starts.of([HEAD]) is None, "a body must be longer than what is kept"
