"""A conversation as messages, and which of its questions wait for an answer. Knows no file and no tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "system": "system"}  # fmt: skip


class Message(NamedTuple):
    """role: system, user or assistant."""

    role: str
    content: str


Conversation = tuple[Message, ...]


def message_of(said: object) -> Message | None:
    """Of {"role", "content"} or {"from", "value"}; None where it is neither."""
    if not isinstance(said, Mapping):
        return None
    role = ROLES.get(str(said.get("role", said.get("from"))))
    content = said.get("content", said.get("value"))
    return Message(role, content) if role is not None and isinstance(content, str) else None


def open_question(conversation: Conversation) -> int | None:
    """The number of messages up to the first question that has no answer, with it; None where all have theirs."""
    pairs = zip(conversation, (*conversation[1:], None), strict=True)
    for place, (message, after) in enumerate(pairs, start=1):
        if message.role == "user" and (after is None or after.role == "user"):
            return place
    return None


def waits(conversation: Conversation) -> bool:
    """Whether a user's message in it has no answer."""
    return open_question(conversation) is not None


def filled(conversation: Conversation, answers: Sequence[str]) -> Conversation:
    """The conversation with its first open questions answered."""
    for answer in answers:
        end = open_question(conversation)
        conversation = (*conversation[:end], Message("assistant", answer), *conversation[end:])
    return conversation


def is_plain(conversation: Conversation) -> bool:
    """Whether it is a text without roles."""
    return [message.role for message in conversation] == ["assistant"]
