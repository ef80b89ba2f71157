"""A start that generation requests share is computed once, and the generated tokens are the same."""

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, PAD, build_model

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel, Sharing
from intactkv_eval.pivot.capture import capture, fingerprint_of

TOKENS = (BOS, 7)
HEAD = [(37 * place) % 250 for place in range(1, 25)]
BODIES = [HEAD + rest for rest in ([3], [5, 9, 11, 200, 17], [90, 91, 92, 93, 41, 42, 43, 44])]
CELLS = {"intact": (True, KVSpec()), "computed": (False, KVSpec()), "computed kv3 keep 4": (False, KVSpec(bits=3, sink_tokens=4)),
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
    starts = PrefixCache(SharedModel(made))
    ids, mask = padded(BODIES)
    expected = generate(made, ids, mask, 6, **OPTIONS)
    for _ in range(2):
        assert torch.equal(generate(made, ids, mask, 6, None, starts, **OPTIONS), expected)
    assert starts.computed == (0 if made.window else 1)
    beams = {**OPTIONS, "num_beams": 2}
    assert torch.equal(generate(made, ids, mask, 4, None, starts, **beams), generate(made, ids, mask, 4, **beams))


def test_one_row_at_a_time_finds_the_start_in_its_neighbours():
    made = pivoted("llama", "intact")
    starts = PrefixCache(SharedModel(made))
    for body in [*BODIES, *BODIES]:
        ids, mask = padded([body])
        assert torch.equal(
            generate(made, ids, mask, 5, None, starts, **OPTIONS), generate(made, ids, mask, 5, **OPTIONS)
        )
    assert starts.computed == 1


def test_nothing_is_kept_where_little_is_shared_or_the_model_cannot(monkeypatch):
    made = pivoted("llama", "intact")
    starts = PrefixCache(SharedModel(made))
    assert starts.of([[*HEAD[:10], 1, 2], [*HEAD[:10], 3]]) is None
    assert starts.of([[4, 5, 6]]) is None
    assert starts.of([HEAD[:3]]) is None
    monkeypatch.setattr(SharedModel, "sharing", Sharing.NOTHING)
    assert starts.of(BODIES) is None


def test_another_start_takes_the_place_of_the_kept_one():
    made = pivoted("llama", "intact")
    starts = PrefixCache(SharedModel(made))
    other = [[9, *body] for body in BODIES]
    assert starts.of(BODIES).tokens == [tuple(HEAD)] * 3
    assert starts.of(other) is None  # the row before them shares nothing with them
    assert starts.of(other).tokens[0] == (9, *HEAD)
    assert starts.of([HEAD]) is None, "a body must be longer than what is kept"


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_second_turn_goes_on_from_the_first(family, cell):
    made = pivoted(family, cell)
    starts = PrefixCache(SharedModel(made))
    ids, mask = padded([[5, *HEAD], [*HEAD[5:], 3, 9, 11], [8, 80, 81]])
    computed = []
    made.model.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with starts.turns_kept():
        first = generate(made, ids, mask, 6, None, starts, **OPTIONS)
        answers = [row[row != PAD].tolist() for row in first]
        turned = [[*answer, 44, 45, 46] for answer in answers[:2]] + [[*HEAD[::-1], 4], [*answers[2][:-1], 99, 98, 97]]
        again, seen = padded(turned)
        expected = generate(made, again, seen, 6, **OPTIONS)
        computed.clear()
        assert torch.equal(generate(made, again, seen, 6, None, starts, **OPTIONS), expected)
        assert torch.equal(
            generate(made, again, seen, 4, None, starts, **OPTIONS, num_beams=2),
            generate(made, again, seen, 4, **OPTIONS, num_beams=2),
        )
        one, two = padded(turned[:2])
        computed.clear()
        generate(made, one, two, 2, None, starts, **OPTIONS)
        assert (computed[0] < 10) == (made.window is None), "the first turn was computed again"
    assert starts.turns is None


def test_held_turns_stay_in_their_budget():
    made = pivoted("llama", "intact")
    starts = PrefixCache(SharedModel(made))
    with starts.turns_kept():
        for number in range(6):
            ids, mask = padded([[number + 20, *HEAD]])
            generate(made, ids, mask, 2, None, starts, **OPTIONS)
            if not number:
                starts.turns.budget = 3 * sum(held.size for held in starts.turns._held.values())
        assert starts.turns.of([[20, *HEAD, 3]], 16) is None
        assert len(starts.turns.of([[25, *HEAD, 3]], 16).tokens[0]) == 25
