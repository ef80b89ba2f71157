"""Chat prompts behind a pivot that is a chat's head, or that begins with the token that opens every message."""

import copy

import pytest
from helpers.tiny import BOS, build_model

from intactkv_eval.errors import PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}<s>assistant"
THINKING = (
    "{{ bos_token }}thinking {{ 'off' if enable_thinking is false else 'on' }}\n"
    "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
)
HI = {"role": "user", "content": "hi"}
PIRATE = {"role": "system", "content": "Talk like a pirate."}


def make(tokenizer, template=None, **arguments):
    own = copy.deepcopy(tokenizer)
    own.chat_template = template or own.chat_template
    return IntactKVLM(pretrained=build_model("llama"), tokenizer=own, **arguments)


def behind(lm, *messages):
    """What stands behind the pivot of a chat prompt."""
    ids, _ = lm.tok_batch_encode([lm.apply_chat_template(list(messages))])
    return lm.tokenizer.decode(ids[0])


@pytest.mark.parametrize("arguments", [{"enable_thinking": False}, {"chat_template_args": {"enable_thinking": False}}])
def test_the_head_is_written_as_requests_are(tokenizer, arguments):
    lm = make(tokenizer, THINKING, pivot="prompt", **arguments)
    assert lm.tokenizer.decode(lm.pivoted_model.token_ids) == "<s>thinking off\n"
    assert behind(lm, HI) == "hi\n"
    assert dict(lm.framing.counts) == {"stripped": 1}


def test_a_prompt_without_the_head_is_refused(tokenizer, tmp_path):
    lm = make(tokenizer, pivot="prompt")
    assert behind(lm, HI) == "hi\nassistant:"
    file = tmp_path / "head.safetensors"
    lm.pivoted_model.pivot.save(file)
    for cell in (lm, make(tokenizer, pivot="prompt", intact=False), make(tokenizer, pivot=str(file))):
        with pytest.raises(PivotError, match=r"'<s>Be kind.\\nuser: ', and this prompt begins otherwise: '<s>Be kind"):
            cell.apply_chat_template([PIRATE, HI])
    assert behind(make(tokenizer), PIRATE, HI).startswith("Be kind.\nsystem: Talk")
    other = f"tokens:{BOS}+7+9"
    assert behind(make(tokenizer, pivot=other), PIRATE, HI).startswith("Be kind."), "a lone BOS is replaced"


def test_a_message_that_runs_into_the_head_is_warned_of_once(tokenizer, caplog):
    lm = make(tokenizer, pivot="prompt")
    for _ in range(2):
        lm.check_head("<s>Be kind.\nuser: hi", [BOS, 1, 2])
    assert lm.framing.counts["two_heads"] == 2
    assert caplog.text.count("second head") == 1


def test_no_message_loses_the_token_that_opens_it(tokenizer):
    lm = make(tokenizer, CHATML, pivot=f"tokens:{BOS}+7+9")
    assert behind(lm, PIRATE, HI) == "<s>system\nTalk like a pirate.</s>\n<s>user\nhi</s>\n<s>assistant"
    assert dict(lm.framing.counts) == {"prepended": 1}
