"""Which tokens are the pivot."""

import copy

import pytest
from helpers.tiny import BOS, VOCAB

from intactkv_eval.cell.spec import PivotSpec
from intactkv_eval.chat import sandbox
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.pivot.tokens import opens_messages, prompt_head, resolve_tokens, use_chat_template

VICUNA_HEAD = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER:"
)


def test_bos_and_lists(tokenizer):
    assert resolve_tokens(PivotSpec(), tokenizer, VOCAB) == (BOS,)
    assert resolve_tokens(PivotSpec(source="tokens:3+3"), tokenizer, VOCAB) == (3, 3)
    with pytest.raises(PivotError, match="outside"):
        resolve_tokens(PivotSpec(source=f"tokens:{VOCAB}"), tokenizer, VOCAB)


def test_prompt_is_the_constant_head(tokenizer):
    head = resolve_tokens(PivotSpec(source="prompt"), tokenizer, VOCAB)
    assert tokenizer.decode(head) == "<s>Be kind.\nuser: "
    assert head[0] == BOS


CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}<s>assistant\n"


def test_the_head_is_of_the_arguments_that_requests_get(tokenizer):
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = "{{ 'off' if enable_thinking is false else 'on' }}\n{{ messages[0]['content'] }}"
    assert thinking.decode(prompt_head(thinking)) == "on\n"
    assert (
        thinking.decode(
            resolve_tokens(PivotSpec(source="prompt"), thinking, VOCAB, ChatSettings({"enable_thinking": False}))
        )
        == "off\n"
    )


def test_which_token_opens_messages(tokenizer):
    chatml = copy.deepcopy(tokenizer)
    assert not opens_messages(chatml, BOS, ChatSettings())
    chatml.chat_template = CHATML
    assert opens_messages(chatml, BOS, ChatSettings())
    for template in (None, "{{ raise_exception('no') }}"):
        chatml.chat_template = template
        assert not opens_messages(chatml, BOS, ChatSettings())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x", "more than 1 s or 512 MiB"),
        ("{{ 'a' * 10**9 }}", "512 MiB"),
        ("{{ 'a' * 10**6 }}", "writes 1000000 characters"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_strangers_template_is_bound_in_time_and_memory(tokenizer, template, message, monkeypatch):
    monkeypatch.setattr(sandbox, "TEMPLATE_SECONDS", 1)
    stranger = copy.deepcopy(tokenizer)
    stranger.chat_template = template
    with pytest.raises(PivotError, match=message):
        prompt_head(stranger)


def test_vicuna_template(tokenizer):
    vicuna = copy.deepcopy(tokenizer)
    use_chat_template(vicuna, "vicuna_v1.1")
    assert vicuna.decode(prompt_head(vicuna)) == f"<s>{VICUNA_HEAD} "
    talk = [{"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Hello."), ("user", "More"))]
    text = vicuna.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{VICUNA_HEAD} Hi ASSISTANT: Hello.</s>USER: More ASSISTANT:"


def test_a_tokenizer_without_bos_is_told_what_to_do(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    with pytest.raises(PivotError, match="tokens:257"):
        resolve_tokens(PivotSpec(), bare, VOCAB)
    assert resolve_tokens(PivotSpec(intact=False), bare, VOCAB) == ()


def test_templates_that_cannot_be_used(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(PivotError, match="no chat template"):
        prompt_head(bare)
    bare.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(PivotError, match="no common token"):
        prompt_head(bare)
    bare.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(PivotError, match="fails"):
        prompt_head(bare)
    with pytest.raises(ConfigError, match=r"vicuna_v1\.1"):
        use_chat_template(bare, "vicuna")
