"""Models whose RoPE frequencies depend on the length: the numbers and texts of plain transformers, one text at a time."""

from importlib.metadata import version

import pytest
import torch
from kv_cells import pivoted, spec
from lm_eval.models.huggingface import HFLM
from packaging.version import Version
from tiny import _SHAPE, BOS, EOS, FAMILIES, byte_tokenizer, uneven
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.config import KVSpec, WeightSpec
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.harness import talks
from intactkv_eval.harness.build import quantize
from intactkv_eval.harness.generation import generate
from intactkv_eval.harness.lm import IntactKVLM
from intactkv_eval.harness.lm_talks import REQUEST
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.score_table import Request
from intactkv_eval.harness.scoring import score
from intactkv_eval.harness.shared import SharedModel
from intactkv_eval.model.rope_length import as_in_text_of, first_position_is_same, rope_by_length
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.kv import PivotKV

OLD = Version(version("transformers")) < Version("5.23")
# In these releases PhiMoE has no long frequencies, a text behind a longer one keeps the longer one's with dynamic NTK, and
# `generate` drops all but the last token at Phi-3's border.
BORDER, HALF = 40, 8  # positions, and half the channels of a head
FACTORS = {"short_factor": [1 + 0.02 * i for i in range(HALF)], "long_factor": [1 + 2.0 * i for i in range(HALF)]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": BORDER, **FACTORS}
MODELS = {
    "phi3": lambda: Phi3Config(**_SHAPE, original_max_position_embeddings=BORDER, rope_parameters=LONGROPE),
    "phimoe": lambda: PhimoeConfig(
        **_SHAPE, num_local_experts=2, original_max_position_embeddings=BORDER,
        rope_parameters={**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.3},
    ),
    "dynamic": lambda: LlamaConfig(
        **{**_SHAPE, "max_position_embeddings": BORDER},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}  # fmt: skip
DYNAMIC = MODELS["dynamic"]
if OLD:
    del MODELS["phimoe"], MODELS["dynamic"]
LONG = [name for name in MODELS if name != "dynamic"]
TEXT = "the cat sat on the mat and " * 4
PAIRS = [(TEXT[:26], " a b"), (TEXT[:26], " c d e"), (TEXT[:46], "xyz" * 5), (TEXT[:20], "q" * 34), (TEXT[:36], "z")]
PAIRS += [(TEXT[:n], "ab") for n in (BORDER - 2, BORDER - 1, BORDER)]
FRONT = (BOS, 10, 20, 30)
ANSWERS_OF_UNLIKE_TOKENS = {"phi3": 1, "phimoe": 0}  # seeds of prompts


def build(name, seed=0):
    torch.manual_seed(seed)
    model = uneven(AutoModelForCausalLM.from_config(MODELS[name]()).float().eval(), 0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight[BOS] *= 6
    return model


def ours(name, **arguments):
    return IntactKVLM(pretrained=build(name), tokenizer=byte_tokenizer(), max_length=120, **arguments)


def hf(name):
    return HFLM(pretrained=build(name), tokenizer=byte_tokenizer(), max_length=120, batch_size=1)


def scores(lm, pairs):
    pairs = [(f"<s>{context}", answer) for context, answer in pairs]  # the tokenizer adds no BOS
    requests = [make_request("loglikelihood", pair, place) for place, pair in enumerate(pairs)]
    return torch.tensor([found for found, _ in lm.loglikelihood(requests, disable_tqdm=True)])


def texts(lm, prompts, **options):
    options = {"until": [], "do_sample": False, "max_gen_toks": 24, **options}
    requests = [
        make_request("generate_until", (f"<s>{one}", dict(options)), place) for place, one in enumerate(prompts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("pivot", ["none", "bos"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_those_of_hf_at_batch_size_one(name, share, pivot):
    lm = ours(name, pivot=pivot, share_prefix=share, batch_size=4)
    torch.testing.assert_close(scores(lm, PAIRS), scores(hf(name), PAIRS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LONG)
def test_a_text_alone_has_the_number_that_it_has_beside_others(name):
    lm = ours(name, pivot="bos", batch_size=4)
    together = scores(lm, PAIRS)
    torch.testing.assert_close(
        torch.cat([scores(lm, [pair]) for pair in PAIRS[::-1]]).flip(0), together, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("intact", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_pivot_of_several_tokens_in_full_precision_is_the_plain_model(name, intact):
    """Law 1 on both sides of the border."""
    lm, plain = ours(name, pivot="tokens:256+10+20+30", intact=intact, batch_size=4), hf(name)
    front = plain.tokenizer.decode(FRONT[1:])
    expected = scores(plain, [(front + context, answer) for context, answer in PAIRS])
    torch.testing.assert_close(scores(lm, PAIRS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("intact", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_row_that_begins_with_the_pivot(name, intact):
    """T tokens in, T rows out: those of the pivot's own tokens are of this length too."""
    model, row = build(name), torch.tensor([[*FRONT, *range(50, 50 + BORDER)]])
    pivot = capture(model, FRONT, fingerprint_of(model, "main")) if intact else None
    made = PivotedModel(
        model, FRONT, pivot, in_long_texts=PivotedModel(model, FRONT, None) if name == "dynamic" else None
    )
    with torch.no_grad():
        expected = build(name)(row).logits
    torch.testing.assert_close(made.logits(row), expected, rtol=0, atol=1e-4)


def test_a_pivot_that_is_quantized_before_rope_is_so_with_the_frequencies_of_long_texts():
    """The first layer's rows are those that the model quantizes when it computes the same tokens."""
    kv = spec("pre_rope", exempt=False)
    made = pivoted(build("phi3"), FRONT, True, kv)
    computing = PivotedModel(made.model, FRONT, None, kv, made.levels)
    cache = computing.new_cache(1)
    run_with_cache(made.model, cache, torch.tensor([[*FRONT, *range(50, 50 + BORDER)]]))
    found = made.for_length(BORDER + 4).front_rows.keys[0]
    torch.testing.assert_close(found, cache.layers[0].keys[0, :, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("front", [(BOS,), FRONT])
@pytest.mark.parametrize("length", [12, BORDER + 8])
@pytest.mark.parametrize("name", LONG)
def test_a_quantized_model_gets_the_rows_of_texts_of_this_length(name, front, length):
    """The oracle is transformers' cache: the full-precision model's over the same text, cut behind the pivot."""
    full = build(name)
    if name == "phimoe":  # its experts are no linear layers
        quantized = build(name)
        with torch.no_grad():
            for part in quantized.parameters():
                part.copy_((part * 16).round() / 16)
    else:
        quantized = quantize(full, WeightSpec(method="rtn", bits=3, group_size=32))
    body = torch.arange(10, 10 + length)[None]
    cache = DynamicCache(config=full.config)
    with torch.no_grad():
        full(torch.cat([torch.tensor([front]), body], 1), **cache_argument(full, cache))
        cache.crop(-length)
        expected = quantized(body, **cache_argument(quantized, cache)).logits
    pivot = capture(full, front, fingerprint_of(full, "main"))
    found = PivotedModel(quantized, front, pivot).body_logits(body)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    if len(front) > 1 and length > BORDER:
        pivot = capture(full, front, fingerprint_of(full, "main"))
        object.__setattr__(pivot, "long", None)
        with pytest.raises(PivotError, match=f"texts of up to {BORDER} tokens"):
            PivotedModel(quantized, front, pivot).body_logits(body)


def test_both_sets_of_rows_are_in_the_file(tmp_path):
    model = build("phi3")
    pivot = capture(model, FRONT, fingerprint_of(model, "main"))
    pivot.save(tmp_path / "pivot.safetensors")
    again = PivotKV.load(tmp_path / "pivot.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(again.long.keys, pivot.long.keys, strict=True))
    assert not torch.allclose(pivot.long.keys[0], pivot.keys[0], atol=1e-2)
    with pytest.raises(PivotError, match="not shaped"):
        PivotKV(FRONT, pivot.keys, pivot.values, pivot.logits, pivot.fingerprint, long=pivot.long._replace(keys=()))


@pytest.mark.parametrize("kv", [KVSpec(bits=4), spec("pre_rope"), spec("pre_rope", exempt=False), spec("channel_key")])
def test_rows_together_with_a_quantized_cache_are_those_of_rows_alone(kv):
    """In fp64: another order of summation would put a number on the other side of a step."""
    made = pivoted(build("phi3").double(), FRONT, True, kv)
    draw = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(0, 256, (length,), generator=draw).tolist() for length in (5, BORDER - 8, BORDER, BORDER + 30)
    ]
    found = score(SharedModel(made), [Request(row[:-4], row[-4:]) for row in rows], lambda tokens: 8, torch.float64)
    exact = PivotedModel(made.model, FRONT, made.pivot)
    for row, one in zip(rows, found, strict=True):
        sums = []
        for model in (made, exact):
            logits = model.body_logits(torch.tensor([row[:-1]]))[0, -4:].log_softmax(-1)
            sums.append(float(logits.gather(1, torch.tensor([row[-4:]]).T).sum()))
        assert abs(one.log_likelihood - sums[0]) < 1e-8
        if len(row) > 8:  # short ones lie in what channel_key keeps in full
            assert 1e-6 < abs(sums[0] - sums[1]) < 12, "quantized, with the frequencies of this length"


def going_on(name, prompt, count=24):
    """What a plain forward over the whole text, token by token, goes on with; of dynamic NTK, what hf's generate does."""
    lm = hf(name)
    if name == "dynamic":
        return texts(lm, [prompt], max_gen_toks=count)[0]
    ids = lm.tok_encode(f"<s>{prompt}")
    for new in range(count):
        with torch.no_grad():
            ids.append(int(lm.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            count = new + 1
            break
    return lm.tok_decode(ids[-count:])


@pytest.mark.parametrize("pivot", ["none", "bos"])
@pytest.mark.parametrize("name", MODELS)
def test_generation_across_the_border(name, pivot):
    prompts = [TEXT[:n] for n in (5, BORDER - 16, BORDER - 2, BORDER - 1, BORDER, BORDER + 20)]
    expected = [going_on(name, one) for one in prompts]
    assert OLD or expected == [texts(hf(name), [one])[0] for one in prompts]
    assert [texts(ours(name, pivot=pivot, batch_size=2), [one])[0] for one in prompts] == expected
    if name in LONG:
        assert texts(ours(name, pivot=pivot, batch_size=4), prompts) == expected


@pytest.mark.parametrize("name", LONG)
def test_an_answer_ends_at_the_border_and_at_a_stop_across_it(name):
    """The last token before the border ends the answer, or a stop string of which a part stands on each side."""
    made = PivotedModel(build(name), (BOS,), capture(build(name), (BOS,), fingerprint_of(build(name), "main")))
    body = torch.randint(
        0, 256, (1, BORDER - 8), generator=torch.Generator().manual_seed(ANSWERS_OF_UNLIKE_TOKENS[name])
    )

    def answer(**options):
        return generate(made, body, torch.ones_like(body), 20, pad_token_id=0, do_sample=False, **options)[
            0, body.shape[1] :
        ]

    whole = answer(eos_token_id=[])
    before = (
        BORDER - body.shape[1]
    )  # new tokens, the last of which is the first that is seen with the other frequencies
    assert len(set(whole[: before + 1].tolist())) == before + 1, "each token stands there once"
    for place in (before - 2, before - 1, before):
        assert torch.equal(answer(eos_token_id=[int(whole[place])]), whole[: place + 1])

        def stopping(columns, rows, pair=whole[place : place + 2]):
            class Pair(StoppingCriteria):
                def __call__(self, ids, scores, **kwargs):
                    new = ids[:, columns:]
                    return torch.tensor([new.shape[1] > 1 and torch.equal(new[0, -2:], pair)])

            return StoppingCriteriaList([Pair()])

        assert torch.equal(answer(eos_token_id=[], stopping=stopping), whole[: place + 2])


@pytest.mark.skipif(OLD, reason="this release of transformers drops all but the last token at Phi-3's border")
@pytest.mark.parametrize("options", [{"do_sample": True, "temperature": 0.7}, {"repetition_penalty": 1.4}])
def test_samples_and_penalties_go_on_behind_the_border(options):
    prompt = TEXT[: BORDER - 8]
    torch.manual_seed(3)
    expected = texts(hf("phi3"), [prompt], **options)
    torch.manual_seed(3)
    assert texts(ours("phi3", pivot="bos", batch_size=2), [prompt], **options) == expected


def test_a_quantized_cache_is_quantized_behind_the_border_too():
    """What is generated is what whole forwards behind the pivot say, token by token."""
    for arguments in ({"kv_bits": 3}, {"kv_bits": 3, "kv_scheme": "channel_key", "kv_group": 4, "kv_recent": 4}):
        lm = ours("phi3", pivot="bos", batch_size=1, **arguments)
        ids = lm.tok_encode("<s>" + TEXT[: BORDER - 6])
        for _ in range(16):
            ids = [*ids, int(lm.pivoted_model.logits(torch.tensor([ids]))[0, -1].argmax())]
        assert texts(lm, [TEXT[: BORDER - 6]], max_gen_toks=16) == [lm.tok_decode(ids[BORDER - 5 :])]


def test_beams_across_the_border_are_refused_and_beyond_it_are_those_of_hf():
    lm = ours("phi3", pivot="bos", batch_size=1)
    with pytest.raises(ConfigError, match="num_beams=2"):
        texts(lm, [TEXT[: BORDER - 6]], num_beams=2)
    for prompt in (TEXT[:5], TEXT[: BORDER + 5]):
        assert texts(lm, [prompt], num_beams=2) == texts(hf("phi3"), [prompt], num_beams=2)


@pytest.mark.parametrize("name", MODELS)
def test_conversations_across_the_border(name, monkeypatch):
    """Each answer is what a plain forward over the whole conversation goes on with."""
    monkeypatch.setattr(talks, "CHUNK", 4)
    options = {"messages": [{"role": "user", "content": one} for one in ("hello", "and")], "max_gen_toks": 20}
    lm = ours(name, pivot="bos", batch_size=2)
    requests = [make_request(REQUEST, ("hello", options), 0)]
    ((first, second),) = lm.generate_turns(requests, True)
    for turn in (first, second):
        made = going_on(name, turn[1].removeprefix("<s>"), 20)
        assert turn[0] == made.strip()


def test_a_short_text_behind_a_longer_one_has_the_frequencies_of_short_texts():
    """With dynamic NTK, of which some releases of transformers keep the long text's for good."""
    model = AutoModelForCausalLM.from_config(DYNAMIC()).eval()
    short, long = torch.arange(BORDER)[None], torch.arange(BORDER + 30)[None]
    with torch.no_grad():
        expected = model(short).logits
        model(long)
        torch.testing.assert_close(PivotedModel(model, (), None).body_logits(short), expected)


def test_nothing_is_left_in_the_model():
    model = build("phi3")
    lm = IntactKVLM(pretrained=model, tokenizer=byte_tokenizer(), pivot="tokens:256+10", max_length=120, batch_size=2)
    texts(lm, [TEXT[: BORDER - 6]])
    assert "prepare_inputs_for_generation" not in vars(lm.model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in lm.model.modules())
    with pytest.raises(ZeroDivisionError), as_in_text_of(model, 100):
        raise ZeroDivisionError
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_borders_of_configs():
    """Of longrope and of dynamic NTK, of several kinds of layers, and of models of one set of frequencies."""
    borders = [rope_by_length(make()) for make in (MODELS["phi3"], DYNAMIC)]
    assert [(one.border, one.grows) for one in borders] == [(BORDER, False), (BORDER, True)]
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    kinds = {"rope_type": "default", "rope_theta": 1e4}
    for config in (LlamaConfig(**_SHAPE), LlamaConfig(**_SHAPE, rope_parameters=yarn), FAMILIES["gemma3"]()):
        assert rope_by_length(config).border is None
    gemma = FAMILIES["gemma3"]()
    gemma.rope_parameters = {"sliding_attention": kinds, "full_attention": LONGROPE}
    assert rope_by_length(gemma).border == BORDER


@pytest.mark.parametrize(("name", "same"), [("phi3", True), ("phimoe", False)])
def test_a_key_at_the_first_position(name, same):
    """PhiMoE's have another scale beyond the border."""
    if name not in MODELS:
        pytest.skip("this release of transformers has no long frequencies for PhiMoE")
    assert first_position_is_same(build(name)) is same
