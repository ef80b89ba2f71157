"""Vicuna's conversations in tokens, as IntactKV's released training code makes them: message by message, without </s>.

    BOS, "SYSTEM USER: question ASSISTANT:", "answer", "USER: question ASSISTANT:", "answer", ...

Each part is tokenized by itself, so on a SentencePiece tokenizer a part begins with a space of its own, and no token
spans two of them. All tokens of the answers count. FastChat's template, which requests and MT-Bench's prompts are
written with, ends each answer with </s> instead. An empty question is left out with the words around it.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from intactkv_eval.chat.bos_text import encoded_prompt
from intactkv_eval.chat.messages import Conversation, Message
from intactkv_eval.errors import DataError
from intactkv_eval.storage.files import read_text, shipped_folder

Render = Callable[[Conversation], str]
"""A conversation -> its text by the chat template, with the words that invite an answer."""


def is_vicuna(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template is the shipped vicuna_v1.1."""
    return getattr(tokenizer, "chat_template", None) == _template()


@cache
def _template() -> str:
    return read_text(shipped_folder("model_configs") / "chat_templates" / "vicuna_v1.1.jinja")


def released_tokens(conversation: Conversation, tokenizer: Any, invited: Render) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which are the assistant's.

    Raises DataError for a system message behind another message, which the template has no place for.
    """
    system, spoken = conversation[:1], conversation[1:]
    if system and system[0].role != "system":
        system, spoken = (), conversation
    if any(message.role == "system" for message in spoken):
        raise DataError("a system message stands behind another message, but vicuna_v1.1 has one, at the start")
    head = invited((*system, Message("user", "x"))).removesuffix(_question("x"))
    first, *later = spoken or (Message("user", ""),)
    tokens = encoded_prompt(tokenizer, head + _text(first))
    mine = [False] * len(tokens)
    for message in later:
        ids = tokenizer(_text(message), add_special_tokens=False, verbose=False).input_ids
        tokens += ids
        mine += [message.role == "assistant"] * len(ids)
    return tokens, mine


def _text(message: Message) -> str:
    return message.content if message.role == "assistant" or not message.content else _question(message.content)


def _question(content: str) -> str:
    return f"USER: {content} ASSISTANT:"
