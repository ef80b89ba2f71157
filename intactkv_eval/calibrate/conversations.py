"""Conversations to calibrate on: ShareGPT JSON, messages, questions with turns, or plain text.

    .json    a list of {"conversations": [{"from": "human", "value": ...}, ...]}, or as below
    .jsonl   lines: {"messages": [{"role": "user", "content": ...}, ...]}, {"turns": [...]} or {"text": ...}
    .txt     one text; texts have no roles, all of their tokens count
    NAME     a data set of the hub with one of these columns, NAME:SPLIT for another split than train

A conversation whose user has the last word waits for an answer (harness/answers.py). Knows no tokens and no models.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.data import digest_of_text, load_dataset
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.files import read_jsonl

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
          "system": "system"}  # fmt: skip


class Message(NamedTuple):
    """role: system, user or assistant."""

    role: str
    content: str


Conversation = tuple[Message, ...]


class Conversations(NamedTuple):
    """texts: each conversation; a plain text is one assistant's message alone. digest: SHA-256 over all."""

    texts: tuple[Conversation, ...]
    source: str
    digest: str

    @classmethod
    def of(cls, texts: Iterable[Conversation], source: str) -> "Conversations":
        """With their digest."""
        kept = tuple(texts)
        return cls(kept, source, digest_of_text(json.dumps(kept, ensure_ascii=False)))


def load_conversations(source: str) -> Conversations:
    """All conversations of a file or a data set.

    Raises ConfigError for an unknown kind of source, DataError for a row that is no conversation, naming it.
    """
    path = Path(source)
    if path.suffix == ".txt":
        return Conversations.of([(Message("assistant", _read(path)),)], path.name)
    if path.suffix in {".json", ".jsonl"}:
        rows = read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path)
        place = str(path)
    elif "/" in source and not path.suffix:
        name, _, split = source.partition(":")
        rows, place = load_dataset(name, split=split or "train"), source
    else:
        raise ConfigError(f"conversations {source!r}: use a .json, .jsonl or .txt file, or a data set ORG/NAME")
    texts = [conversation_of(row, f"{place}, row {number}") for number, row in enumerate(rows, start=1)]
    if not texts:
        raise DataError(f"{place}: holds no conversation")
    return Conversations.of(texts, path.name if path.suffix else source)


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """One row. Raises DataError, with its place, where it is no conversation."""
    if isinstance(row, Mapping) and isinstance(row.get("turns"), list):
        turns = row["turns"]
        if turns and all(isinstance(turn, str) for turn in turns):
            return tuple(Message("user", turn) for turn in turns)
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return (Message("assistant", row["text"]),)
    listed = next((row[key] for key in ("messages", "conversations") if row.get(key)), None) if row else None
    if not isinstance(listed, list):
        raise DataError(
            f"{place}: expected messages, conversations, turns or text, found {', '.join(map(str, row or ()))}"
        )
    found = []
    for message in listed:
        role = _ROLES.get(str(message.get("role", message.get("from"))))
        content = message.get("content", message.get("value"))
        if role is None or not isinstance(content, str):
            raise DataError(
                f"{place}: a message needs a role ({', '.join(sorted(set(_ROLES)))}) and a text, found {message!r:.80}"
            )
        found.append(Message(role, content))
    return tuple(found)


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


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"conversations {str(path)!r}: no such file")
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> list[Any]:
    try:
        rows = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of conversations")
    return rows
