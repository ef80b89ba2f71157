"""Law 14: scoring through shared prefixes gives the answers of scoring every request by itself."""

import math
import random

import pytest
import torch
from helpers.kv_cells import pivoted as cell_on
from helpers.kv_cells import spec
from helpers.tiny import BOS, FAMILIES, VOCAB, build_model

import intactkv_eval.inference.scoring.lm_head as head_module
import intactkv_eval.inference.scoring.prefix_sharing as shared_module
import intactkv_eval.inference.scoring.score as scoring_module
from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.inference.padding_probe import TESTED
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.lm_head import LMHead
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel, Sharing
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import Counts, score

TOKENS = (BOS, 7)
CELLS = {
    "intact": (True, KVSpec()),
    "computed": (False, KVSpec()),
    "intact kv3": (True, KVSpec(bits=3)),
    "computed kv3 keep 4": (False, KVSpec(bits=3, sink_tokens=4)),
    "intact pre_rope": (True, spec("pre_rope", quantize_pivot=True)),
}


def few_shot_requests(seed=0):
    """Two subjects with long heads, questions with several choices, questions that begin others, and loose texts."""
    draw = random.Random(seed)

    def text(length):
        return [draw.randrange(10, VOCAB - 3) for _ in range(length)]

    requests = []
    for _ in range(2):
        head = text(40)
        for _ in range(5):
            question = head + text(draw.randrange(3, 12))
            requests += [Request(question, [choice]) for choice in (65, 66, 67, 68)]
            requests += [Request(question, text(draw.randrange(2, 7))) for _ in range(3)]
        requests += [Request(head, text(3)), Request(head[:20], head[20:] + text(2))]
    for _ in range(6):
        context = text(draw.randrange(1, 15))
        requests += [Request(context, text(4)), Request(context, text(2)), Request(context[:-1], context[-1:])]
    requests += [Request([], [65]), Request([], text(5)), Request(text(3), text(60))]
    draw.shuffle(requests)
    return requests


def pivoted(model, cell):
    """KV cells in fp64: in fp32 another order of summation now and then puts one number on the other side of a step."""
    intact, kv = CELLS[cell]
    if kv.bits < 16:
        model = model.double()
    return cell_on(model, TOKENS, intact, kv)


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert abs(one.log_likelihood - other.log_likelihood) < 1e-3
        assert one.is_greedy == other.is_greedy


@pytest.fixture(params=["packed", "small rows"])
def row_size(request, monkeypatch):
    if request.param == "small rows":
        monkeypatch.setattr(head_module, "SLICE_BYTES", 4 * VOCAB * 5)
        monkeypatch.setattr(scoring_module, "CAPACITY", 24)
        monkeypatch.setattr(scoring_module, "OVERHEAD", 4)
        monkeypatch.setattr(scoring_module, "SMALLEST_BATCH", 50)


@pytest.mark.parametrize("cell", CELLS)
def test_every_family_and_cache(model, cell, row_size):
    made = pivoted(model, cell)
    requests = few_shot_requests()
    counts, plain_counts = Counts(), Counts()
    assert SharedModel(made).sharing is Sharing.TREES
    found = score(SharedModel(made), requests, lambda tokens: 3, counts=counts)
    expected = score(SharedModel(made), requests, lambda tokens: 1, share=False, counts=plain_counts)
    assert_same(found, expected)
    assert counts.tokens < 0.6 * plain_counts.tokens


@pytest.mark.parametrize("cell", CELLS)
def test_kept_prefixes_alone(model, cell, monkeypatch):
    """A model whose attention takes no mask of its own: rows of single sequences behind kept prefixes."""
    monkeypatch.setattr(SharedModel, "sharing", Sharing.PREFIXES)
    made = pivoted(model, cell)
    requests = few_shot_requests(1)
    counts, plain_counts = Counts(), Counts()
    found = score(SharedModel(made), requests, lambda tokens: 4, counts=counts)
    monkeypatch.undo()
    assert_same(found, score(SharedModel(made), requests, lambda tokens: 1, share=False, counts=plain_counts))
    assert counts.tokens < 0.8 * plain_counts.tokens


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_unshared_is_the_plain_model(family):
    """What `share=False` gives, from the model's own log-softmax of whole rows."""
    model = build_model(family)
    made = pivoted(model, "intact")
    requests = few_shot_requests(2)
    for request, found in zip(requests, score(SharedModel(made), requests, lambda tokens: 2, share=False), strict=True):
        whole = [*TOKENS, *request.context, *request.continuation]
        with torch.no_grad():
            logits = torch.log_softmax(model(torch.tensor([whole])).logits[0, :-1], dim=-1)
        rows = logits[len(whole) - len(request.continuation) - 1 :]
        target = torch.tensor(request.continuation)
        assert found.log_likelihood == pytest.approx(float(rows.gather(1, target[:, None]).sum()), abs=5e-4)
        assert found.is_greedy == bool((rows.argmax(-1) == target).all())


def test_a_trial_allows_what_the_tests_allow(model):
    """Families that are not in the tests are tried on a short text: here the trial itself, and that it can fail."""
    assert {build_model(family).config.model_type for family in FAMILIES} == TESTED
    right = shared_module.padded
    for cell in ("intact", "computed"):
        made = SharedModel(pivoted(model, cell))
        assert made.sharing is Sharing.TREES
        assert made._allowed(tried=True) is Sharing.TREES
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared_module, "padded", lambda rows: (right(rows)[0], 2 * right(rows)[1]))
            assert made._allowed(tried=True) is not Sharing.TREES


def test_soft_capped_logits(monkeypatch):
    """Logits that the model changes behind its output embedding are made in its own forward."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=16, sliding_window=8, initializer_range=0.15,
                     final_logit_softcapping=2.0, max_position_embeddings=128)
    ).eval()  # fmt: skip
    assert not LMHead(model).is_plain
    monkeypatch.setattr(head_module, "_CHANGES", ())
    assert not LMHead(model).is_plain, "the trial sees it too"
    monkeypatch.undo()
    assert all(LMHead(build_model(family)).is_plain for family in FAMILIES)
    made = pivoted(model, "intact")
    requests = few_shot_requests()
    assert_same(
        score(SharedModel(made), requests, lambda tokens: 3),
        score(SharedModel(made), requests, lambda tokens: 1, share=False),
    )
    request = requests[0]
    whole = [*TOKENS, *request.context, *request.continuation]
    with torch.no_grad():
        logits = torch.log_softmax(model(torch.tensor([whole])).logits[0, :-1], dim=-1)[-len(request.continuation) :]
    expected = float(logits.gather(1, torch.tensor(request.continuation)[:, None]).sum())
    assert score(SharedModel(made), [request], lambda tokens: 1)[0].log_likelihood == pytest.approx(expected, abs=5e-4)


def test_what_a_layer_has_attended_to_is_let_go():
    made = SharedModel(pivoted(build_model("llama"), "intact"))
    caches = []
    with pytest.MonkeyPatch.context() as patch:
        fresh = shared_module.SharedPrefixCache
        patch.setattr(shared_module, "SharedPrefixCache", lambda *args: caches.append(fresh(*args)) or caches[-1])
        score(made, few_shot_requests(), lambda tokens: 3)
    lengths = {layer.keys.shape[2] for cache in caches if not cache._keep for layer in cache.layers}
    assert lengths == {len(TOKENS)}, "only the pivot stays: nothing of the rows behind it"
    assert all(len(cache.layers) == 3 for cache in caches)


def test_eager_attention():
    model = build_model("llama")
    model.set_attn_implementation("eager")
    made = pivoted(model, "intact")
    requests = few_shot_requests()
    assert SharedModel(made).sharing is Sharing.TREES
    assert_same(
        score(SharedModel(made), requests, lambda tokens: 3),
        score(SharedModel(made), requests, lambda tokens: 1, share=False),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    made = pivoted(build_model("llama", dtype=dtype), "intact")
    requests = few_shot_requests()
    assert SharedModel(made).sharing is Sharing.TREES
    found = score(SharedModel(made), requests, lambda tokens: 3)
    expected = score(SharedModel(made), requests, lambda tokens: 1, share=False)
    for one, other in zip(found, expected, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, rel=0.05, abs=0.1)


def test_a_model_that_cannot_share_is_scored_whole_and_says_so_once(caplog):
    """ALiBi counts columns, not positions: branches in one row would be told apart wrongly."""
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3))
    made = PivotedModel(bloom.eval(), TOKENS, None)
    requests = few_shot_requests()
    expected = score(SharedModel(made), requests, lambda tokens: 2, share=False)
    assert_same(score(SharedModel(made), requests, lambda tokens: 2), expected)
    assert len([record for record in caplog.records if "branches" in record.message]) == 1
    mamba = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, state_size=4)).eval()
    made = PivotedModel(mamba, TOKENS, None)
    expected = score(SharedModel(made), requests, lambda tokens: 1, share=False)
    caplog.clear()
    shared = SharedModel(made)
    assert_same(score(shared, requests, lambda tokens: 1), expected)
    assert_same(score(shared, requests, lambda tokens: 1), expected)
    assert len([record for record in caplog.records if "not shared" in record.message]) == 1


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(monkeypatch):
    made = pivoted(build_model("llama"), "intact")
    requests = few_shot_requests()
    expected = score(SharedModel(made), requests, lambda tokens: 1, share=False)
    forward = SharedModel.forward
    limit = 70  # the longest sequence has 66

    def small_memory(self, prefix, rows, keep=False):
        if len(rows) * max(len(row.tokens) for row in rows) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, prefix, rows, keep)

    counts, answered = Counts(), []
    sharing = SharedModel(made).sharing
    monkeypatch.setattr(SharedModel, "sharing", sharing)
    monkeypatch.setattr(SharedModel, "forward", small_memory)
    found = score(
        SharedModel(made), requests, lambda tokens: 64, done=lambda index, one: answered.append(index), counts=counts
    )
    assert_same(found, expected)
    assert counts.halved >= 2
    assert sorted(answered) == list(range(len(requests)))


def test_a_prefix_that_cannot_be_kept_is_computed_with_each_of_its_users(monkeypatch):
    made = pivoted(build_model("llama"), "intact")
    requests = few_shot_requests()
    expected = score(SharedModel(made), requests, lambda tokens: 1, share=False)
    forward, failed = SharedModel.forward, []

    def no_room_for_one(self, prefix, rows, keep=False):
        if len(rows) == 1 and len(rows[0].tokens) == 40:
            failed.append(rows)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return forward(self, prefix, rows, keep)

    monkeypatch.setattr(scoring_module, "CAPACITY", 24)
    monkeypatch.setattr(SharedModel, "forward", no_room_for_one)
    assert_same(score(SharedModel(made), requests, lambda tokens: 4), expected)
    assert failed


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    made = pivoted(build_model("llama"), "intact")
    monkeypatch.setattr(SharedModel, "sharing", Sharing.TREES)

    def broken(self, prefix, rows, keep=False):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(SharedModel, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        score(SharedModel(made), few_shot_requests(), lambda tokens: 4)


def test_nothing_is_left_on_the_model(model):
    made = pivoted(model, "intact")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    score(SharedModel(made), few_shot_requests(), lambda tokens: 3)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert math.isfinite(score(SharedModel(made), [Request([5], [6])], lambda tokens: 1)[0].log_likelihood)
