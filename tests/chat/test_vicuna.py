"""Vicuna's training targets beside what its released code knows: system messages, and other chat templates."""

import copy

import pytest

from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Message
from intactkv_eval.chat.vicuna import is_vicuna
from intactkv_eval.errors import DataError
from intactkv_eval.pivot.tokens import use_chat_template
from intactkv_eval.training.examples import examples_of

TALK = (
    Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four five"),
)  # fmt: skip


@pytest.fixture
def vicuna(tokenizer):
    made = copy.deepcopy(tokenizer)
    use_chat_template(made, "vicuna_v1.1")
    return made


def example(conversation, tokenizer):
    (found,) = examples_of(Conversations.of([conversation], "x"), tokenizer, list, least_counted=2)
    return tokenizer.decode(found.body), tokenizer.decode(found.body[found.counted])


def test_no_token_stands_behind_an_answer(vicuna):
    whole, mine = example(TALK, vicuna)
    assert whole.startswith("<s>A chat between")
    assert whole.endswith("questions. USER: one ASSISTANT:twoUSER: three ASSISTANT:four five")
    assert mine == "twofour five"


def test_a_system_message_takes_the_place_of_the_templates(vicuna):
    whole, mine = example((Message("system", "Be brief."), *TALK[:2]), vicuna)
    assert (whole, mine) == ("<s>Be brief. USER: one ASSISTANT:two", "two")
    with pytest.raises(DataError, match="stands behind another message"):
        example((*TALK[:2], Message("system", "Be brief."), *TALK[2:]), vicuna)


def test_other_chat_templates_write_their_own_text(vicuna, tokenizer):
    assert is_vicuna(vicuna)
    assert not is_vicuna(tokenizer)
    assert example(TALK, tokenizer)[1] == " two\n four five\n"
    vicuna.chat_template += "{# mine #}"
    assert not is_vicuna(vicuna)
    assert example(TALK, vicuna)[1] == " two</s> four five</s>"
