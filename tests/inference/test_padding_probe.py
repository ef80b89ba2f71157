"""Models that count columns (ALiBi as MPT has it, GPT-Neo's local attention): padding in a row's middle would move the text."""

import pytest
import torch
from helpers.kv_cells import pivoted, spec
from helpers.tiny import BOS, EOS, PAD, VOCAB, build_model, uneven
from transformers import AutoModelForCausalLM, GPTNeoConfig, MptConfig, PhiConfig

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.grouped_kv_probe import check_groups
from intactkv_eval.inference.padding_probe import PaddingProbe
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel, Sharing
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import score

WINDOW = 64
SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "initializer_range": 0.15}
COUNTING = {
    "mpt": lambda: MptConfig(vocab_size=VOCAB, d_model=64, n_layers=2, n_heads=4, max_seq_len=512, initializer_range=0.15),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=64, num_layers=2, attention_types=[[["global", "local"], 1]], num_heads=4,
        window_size=WINDOW, max_position_embeddings=512, **SPECIAL,
    ),
}  # fmt: skip
PHI = PhiConfig(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=512, pad_token_id=0, **SPECIAL)  # fmt: skip
HEAD = [(37 * place) % 250 for place in range(1, 25)]
BODIES = [[*HEAD, 5, 9], HEAD + [(91 * place) % 250 for place in range(WINDOW)], [8, 80, 81], [*HEAD, 3, 200, 17, 40]]
OPTIONS = {"do_sample": False, "pad_token_id": PAD}


def built(config):
    torch.manual_seed(0)
    return uneven(AutoModelForCausalLM.from_config(config).eval(), 0.1)


@pytest.fixture(params=sorted(COUNTING))
def counting(request):
    return built(COUNTING[request.param]())


def padded(bodies):
    longest = max(map(len, bodies))
    ids = torch.tensor([[PAD] * (longest - len(body)) + body for body in bodies])
    return ids, torch.tensor([[0] * (longest - len(body)) + [1] * len(body) for body in bodies])


def assert_rows_are_alone(made, bodies, starts):
    ids, mask = padded(bodies)
    together = generate(made, ids, mask, 12, None, starts, **OPTIONS)[:, ids.shape[1] :]
    for row, body in enumerate(bodies):
        alone = generate(made, *padded([body]), 12, **OPTIONS)[0, len(body) :].tolist()
        assert together[row, : len(alone)].tolist() == alone, f"row {row}"


@pytest.mark.parametrize("intact", [True, False], ids=["intact", "computed"])
def test_generated_tokens_do_not_depend_on_the_batch(counting, intact):
    made = pivoted(counting, (BOS, 7), intact, KVSpec())
    assert_rows_are_alone(made, BODIES, None)
    assert_rows_are_alone(made, [BODIES[0], BODIES[1], BODIES[3]], PrefixCache(SharedModel(made)))


@pytest.mark.parametrize("intact", [True, False], ids=["intact", "computed"])
def test_nor_on_turns_that_are_held(counting, intact):
    made = pivoted(counting, (BOS, 7), intact, KVSpec())
    starts = PrefixCache(SharedModel(made))
    with starts.turns_kept():
        first = generate(made, *padded([HEAD, BODIES[1][:24]]), 3, None, starts, **OPTIONS).tolist()
        assert_rows_are_alone(made, [first[0] + [4], first[1] + BODIES[1][:WINDOW], BODIES[2]], starts)


def test_branches_of_many_columns_are_scored_as_alone():
    """Branches that stand in one row push its start out of the window, which 24 tokens of a trial do not show."""
    made = pivoted(built(COUNTING["gpt_neo"]()), (BOS,), True, KVSpec())
    requests = [Request([*HEAD, *HEAD, place, 3, 4, 5, 6, 7], [8, 9]) for place in range(12)]
    shared = SharedModel(made)
    assert shared.sharing is Sharing.PREFIXES
    alone = score(SharedModel(made), requests, lambda tokens: 1, share=False)
    for one, other in zip(score(shared, requests, lambda tokens: 4), alone, strict=True):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-3)


def test_both_copies_of_a_row_have_columns():
    with pytest.raises(UnsupportedModelError, match="counts columns"):
        check_groups(pivoted(built(COUNTING["gpt_neo"]()), (BOS,), False, spec("channel_key")))
    check_groups(pivoted(built(PHI), (BOS,), False, spec("channel_key")))


def test_a_trial_goes_as_far_as_it_is_asked():
    """A window of 300 does nothing in rows of 256 columns."""
    config = COUNTING["gpt_neo"]()
    config.window_size = 300
    columns = PaddingProbe(built(config))
    assert [columns.counted(size) for size in (10, 256, 257)] == [False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_count_tokens_pass(dtype):
    model = built(PHI).to(dtype)
    assert not PaddingProbe(model).counted(300)
    made = pivoted(model, (BOS, 7), True, KVSpec())
    assert SharedModel(made).sharing is Sharing.TREES
    starts = PrefixCache(SharedModel(made))
    generate(made, *padded([BODIES[0], BODIES[3]]), 2, None, starts, **OPTIONS)
    assert starts.computed == 1


def test_tested_families_are_not_tried(monkeypatch):
    monkeypatch.setattr(PaddingProbe, "_difference", lambda columns, size: pytest.fail("tried"))
    assert not PaddingProbe(build_model("llama")).counted(10_000)
    assert PaddingProbe(build_model("mistral")).counted(9)
    assert not PaddingProbe(build_model("mistral")).counted(8)
