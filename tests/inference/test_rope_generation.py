"""Texts that grow beyond the length from which on a model has other RoPE frequencies."""

import pytest
import torch
from helpers.rope_models import (
    ANSWERS_OF_UNLIKE_TOKENS,
    BORDER,
    LONG,
    MODELS,
    OLD,
    TEXT,
    build,
    hf,
    ours,
    texts,
)
from helpers.tiny import BOS, EOS, byte_tokenizer
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
)

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.compat.rope_length import as_in_text_of
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.generation import multi_turn
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.pivot.capture import capture, fingerprint_of


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
    for arguments in (
        {"kv_bits": 3},
        {"kv_bits": 3, "kv_scheme": "channel_key", "kv_group_size": 4, "kv_residual_length": 4},
    ):
        lm = ours("phi3", pivot="bos", batch_size=1, **arguments)
        ids = lm.tok_encode("<s>" + TEXT[: BORDER - 6])
        for _ in range(16):
            ids = [*ids, int(lm.pivoted_model.logits(torch.tensor([ids]))[0, -1].argmax())]
        assert texts(lm, [TEXT[: BORDER - 6]], max_gen_toks=16) == [lm.tok_decode(ids[BORDER - 5 :])]


def test_beams_across_the_border_are_refused_and_beyond_it_are_those_of_hf():
    lm = ours("phi3", pivot="bos", batch_size=1)
    with pytest.raises(ConfigError, match="num_beams"):
        texts(lm, [TEXT[: BORDER - 6]], num_beams=2)
    for prompt in (TEXT[:5], TEXT[: BORDER + 5]):
        assert texts(lm, [prompt], num_beams=2) == texts(hf("phi3"), [prompt], num_beams=2)


@pytest.mark.parametrize("name", MODELS)
def test_conversations_across_the_border(name, monkeypatch):
    """Each answer is what a plain forward over the whole conversation goes on with."""
    monkeypatch.setattr(multi_turn, "CHUNK", 4)
    options = {"messages": [{"role": "user", "content": one} for one in ("hello", "and")], "max_gen_toks": 20}
    lm = ours(name, pivot="bos", batch_size=2)
    requests = [make_request(REQUEST, ("hello", options), 0)]
    ((first, second),) = lm.generate_turns(requests, True)
    for turn in (first, second):
        made = going_on(name, turn[1].removeprefix("<s>"), 20)
        assert turn[0] == made.strip()


def test_nothing_is_left_in_the_model():
    model = build("phi3")
    lm = IntactKVLM(pretrained=model, tokenizer=byte_tokenizer(), pivot="tokens:256+10", max_length=120, batch_size=2)
    texts(lm, [TEXT[: BORDER - 6]])
    assert "prepare_inputs_for_generation" not in vars(lm.model)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in lm.model.modules())
    with pytest.raises(ZeroDivisionError), as_in_text_of(model, 100):
        raise ZeroDivisionError
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
