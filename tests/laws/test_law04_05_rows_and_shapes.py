"""Law 4: row i of a batch is that row alone. Law 5: T tokens in, T rows of logits out."""

import pytest
import torch
from helpers.kv_cells import spec
from helpers.tiny import BOS, PAD

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import score
from intactkv_eval.pivot.capture import capture, fingerprint_of

TOKENS = (BOS, 7)
BODIES = [[3], [5, 9, 11, 200, 17, 31, 8, 44, 61, 12, 13], [90, 91, 92, 93], []]
KV = {
    "kv16": KVSpec(),
    "kv3": KVSpec(bits=3),
    "kv3 keep 3": KVSpec(bits=3, sink_tokens=3),
    "groups": spec("channel_key"),
}


@pytest.fixture(params=[True, False], ids=["intact", "computed"])
def intact(request):
    return request.param


@pytest.fixture(params=KV.values(), ids=KV)
def made(model, intact, request):
    pivot = capture(model, TOKENS, fingerprint_of(model, "main")) if intact else None
    return PivotedModel(model, TOKENS, pivot, request.param)


def left_padded(bodies):
    longest = max(map(len, bodies))
    ids = torch.tensor([[PAD] * (longest - len(b)) + b for b in bodies], dtype=torch.long)
    mask = torch.tensor([[0] * (longest - len(b)) + [1] * len(b) for b in bodies], dtype=torch.long)
    return ids, mask


def test_scores_do_not_depend_on_the_batch(made):
    requests = [Request(body, [65, 66, 67]) for body in BODIES] + [Request([], [65])]
    alone = [score(SharedModel(made), [request], lambda tokens: 1)[0] for request in requests]
    for rows in (2, 7):
        together = score(SharedModel(made), requests, lambda tokens, rows=rows: rows)
        for one, other in zip(alone, together, strict=True):
            assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=2e-4)
            assert one.is_greedy == other.is_greedy


def test_generated_tokens_do_not_depend_on_the_batch(made):
    options = {"do_sample": False, "pad_token_id": PAD}
    ids, mask = left_padded(BODIES)
    together = generate(made, ids, mask, 6, **options)[:, ids.shape[1] :]
    for row, body in enumerate(BODIES):
        one_ids, one_mask = left_padded([body])
        alone = generate(made, one_ids, one_mask, 6, **options)[0, len(body) :].tolist()
        assert together[row, : len(alone)].tolist() == alone, f"row {row}"


@pytest.mark.parametrize(
    "inputs",
    [[list(TOKENS)], [[*TOKENS, 40, 41]], [[40, 41, 42]], [[*TOKENS, 40], [50, 51, 52]], [[BOS]]],
    ids=["exactly the pivot", "begins with it", "does not", "mixed rows", "shorter than the pivot"],
)
def test_t_tokens_in_t_rows_out(made, inputs):
    logits = made.logits(torch.tensor(inputs))
    assert logits.shape[:2] == (len(inputs), len(inputs[0]))
    for row, tokens in enumerate(inputs):
        body = tokens[len(TOKENS) :] if tuple(tokens[: len(TOKENS)]) == TOKENS else tokens
        if body:
            torch.testing.assert_close(
                logits[row, len(tokens) - len(body) :], made.body_logits(torch.tensor([body]))[0]
            )
        if len(body) < len(tokens):
            torch.testing.assert_close(logits[row, : len(TOKENS)], made.pivot_logits)
