"""Conversations of models that think: the chat template's arguments, and what of an answer is its thoughts."""

import copy

import pytest
from helpers.tiny import build_model
from lm_eval.models.utils import postprocess_generated_text

from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Message
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.inference.generation import multi_turn
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.multi_turn import REQUEST
from intactkv_eval.training.examples import examples_of

TEMPLATE = (
    "{{ bos_token }}{{ '/no_think\n' if enable_thinking is false }}{% for m in messages %}{{ m['role'] }}: "
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
OFF = [{"enable_thinking": False}, {"chat_template_args": {"enable_thinking": False}}]
OPTIONS = {"messages": [{"role": "user", "content": "hi"}], "max_gen_toks": 4}


def make(tokenizer, **arguments):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = TEMPLATE
    return IntactKVLM(pretrained=build_model("llama"), tokenizer=thinking, pivot="bos", **arguments)


@pytest.mark.parametrize("arguments", [{}, *OFF])
def test_conversations_get_the_arguments_that_other_requests_get(tokenizer, arguments):
    lm = make(tokenizer, **arguments)
    expected = lm.apply_chat_template(OPTIONS["messages"])
    assert ("/no_think" in expected) == bool(arguments)
    ((turn,),) = lm.generate_turns([make_request(REQUEST, ("hi", OPTIONS), 0)], True)
    assert turn[1] == expected


def test_so_do_conversations_to_train_on(tokenizer):
    lm = make(tokenizer, **OFF[0])
    said = Conversations.of([(Message("user", "hi"), Message("assistant", "yes yes"))], "x")
    (example,) = examples_of(said, lm.tokenizer, list, least_counted=1, chat=lm.chat)
    assert lm.tokenizer.decode(example.body).startswith("<s>/no_think\nuser: hi")


@pytest.mark.parametrize("end", ["</think>", "|"], ids=["text", "token"])
@pytest.mark.parametrize("until", [[], ["END"]])
@pytest.mark.parametrize("text", ["hm</think>| yes END no", "hm END", "yes", "a</think>| b </think>| c"])
def test_thoughts_are_no_part_of_an_answer(tokenizer, end, until, text):
    """As lm_eval cuts it. Its releases differ in what follows a stop string among thoughts; ours never generates it."""
    lm = make(tokenizer, think_end_token=tokenizer.encode(end)[0] if len(end) == 1 else end)
    talk = lm._talk({**OPTIONS, "until": until})
    whole = postprocess_generated_text(text, until, end)
    assert lm.answer(talk, tokenizer.encode(text)) == (whole.strip(), bool(until) and "END" in text)


def test_a_stop_among_the_thoughts_does_not_wait_for_the_chunk_to_end(tokenizer):
    """What was generated in vain behind the stop string is no answer."""
    lm = make(tokenizer, think_end_token="</think>")
    row = multi_turn._Row(0, lm._talk({**OPTIONS, "max_gen_toks": 90, "until": ["END"]}))
    row.asked = lm.ask(row.talk, [])
    multi_turn._take(row, tokenizer.encode("hm END </think>yes"), lm)
    assert row.turns[0][:1] + row.turns[0][2:] == ("hm", "stop", len("hm END"))
