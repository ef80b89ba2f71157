"""Law 6: with everything off, the answers are those of lm_eval's own `hf`, with BOS in front."""

import copy

import pytest
import torch
from helpers.tiny import BOS, build_model
from lm_eval.models.huggingface import HFLM

from intactkv_eval.compat.lm_eval_api import make_request, rolling_value
from intactkv_eval.lm.intactkv_lm import IntactKVLM

PAIRS = [("", " one"), ("A question", " yes"), ("A question", " no"), ("x", " a longer answer"), ("trailing ", "space")]
TEXTS = ["short", "a text of more than one hundred and twenty-eight bytes " * 4]


def instances(kind, arguments):
    return [make_request(kind, args, i, task="task") for i, args in enumerate(arguments)]


def rolled(lm, texts):
    answers = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), True)
    return [rolling_value(answer) for answer in answers]


class HFWithBos(HFLM):
    """`hf` on the byte-level tokenizer, which has no post-processor to add BOS when asked to."""

    def tok_encode(self, string, add_special_tokens=None, left_truncate_len=None, **kwargs):
        ids = super().tok_encode(string, add_special_tokens=False)
        ids = ids if add_special_tokens is False or ids[:1] == [BOS] else [BOS, *ids]
        return ids[-left_truncate_len:] if left_truncate_len else ids


@pytest.fixture(params=["pivot=none", "pivot=bos"])
def pair(model, tokenizer, request):
    pivot = request.param.removeprefix("pivot=")
    ours = IntactKVLM(pretrained=model, tokenizer=tokenizer, pivot=pivot, batch_size=3)
    return ours, HFWithBos(pretrained=model, tokenizer=tokenizer, batch_size=3)


def test_log_likelihoods(pair):
    ours, hf = (lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for lm in pair)
    for (one, greedy), (other, hf_greedy) in zip(ours, hf, strict=True):
        assert one == pytest.approx(other, abs=1e-4)
        assert greedy == hf_greedy


def test_rolling(pair, model, tokenizer):
    """`hf` puts BOS in front of a rolling text by itself, whatever add_bos_token says."""
    both = pair[0], HFLM(pretrained=model, tokenizer=tokenizer)
    ours, hf = (rolled(lm, TEXTS[:1]) for lm in both)
    assert ours == pytest.approx(hf, abs=1e-4)


def test_generation(pair):
    arguments = [(text[:60], {"until": ["\n"], "max_gen_toks": 12}) for text in (*TEXTS, "a third")]
    ours = pair[0].generate_until(instances("generate_until", arguments), True)
    for (text, _), answer in zip(arguments, ours, strict=True):
        # One at a time: `hf` itself pads BOS away from its text in a batch with this tokenizer.
        ids = pair[1].tok_encode(text)
        plain = pair[1].model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
        expected = pair[1].tok_decode(plain[0, len(ids) :].tolist()).split("\n")[0].split("</s>")[0]
        assert answer == expected


def test_no_front_at_all_where_the_model_has_no_bos(tokenizer):
    """pivot=none on a tokenizer without BOS puts nothing in front: plain `hf`, token for token."""
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    model = build_model("qwen2")
    ours = IntactKVLM(pretrained=model, tokenizer=bare, pivot="none")
    hf = HFLM(pretrained=model, tokenizer=bare)
    assert ours.pivoted_model.token_ids == ()
    one, other = (lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for lm in (ours, hf))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in other], abs=1e-5)
    assert rolled(ours, TEXTS) == pytest.approx(rolled(hf, TEXTS), abs=1e-4)
