"""Conversations to calibrate on: ShareGPT JSON, messages, questions with turns, or plain text.

    .json    a list of {"conversations": [{"from": "human", "value": ...}, ...]} (sharegpt.py), or as below
    .jsonl   lines: {"messages": [{"role": "user", "content": ...}, ...]}, {"turns": [...]} or {"text": ...}
    .txt     one text; texts have no roles, all of their tokens count
    NAME     a data set of the hub with one of these columns, NAME:SPLIT for another split than train

A conversation whose user has the last word waits for an answer (commands/answer_questions.py).
Knows no tokens and no models.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.chat.messages import ROLES, Conversation, Message, message_of, waits
from intactkv_eval.chat.sharegpt import is_sharegpt, of_sharegpt
from intactkv_eval.data.hub import digest_of_text, load_dataset
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import read_jsonl, read_text

_FILES = {".json", ".jsonl", ".txt"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:\w+)?")


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

    def drawn(self, count: int | None, seed: int) -> "Conversations":
        """In an order drawn by `seed`; where questions wait for answers, so many. As they are without a count."""
        if count is None:
            return self
        order = list(self.texts)
        random.Random(f"drawn {seed}").shuffle(order)
        return Conversations.of(order[:count] if any(map(waits, order)) else order, self.source)


def load_conversations(source: str) -> Conversations:
    """All conversations of a file or a data set; of ShareGPT's layout the usable ones.

    Raises ConfigError for an unknown kind of source, DataError for a row that is no conversation, naming it.
    """
    path = Path(source)
    if path.suffix == ".txt":
        return Conversations.of([(Message("assistant", _read(path)),)], path.name)
    if path.suffix in {".json", ".jsonl"}:
        rows = read_jsonl(path) if path.suffix == ".jsonl" else _read_json(path)
        place = str(path)
    elif _HUB.fullmatch(source) and not path.exists():
        name, _, split = source.partition(":")
        rows, place = load_dataset(name, split=split or "train"), source
    else:
        raise ConfigError(f"conversations {source!r}: use a .json, .jsonl or .txt file, or a data set ORG/NAME")
    if not len(rows):
        raise DataError(f"{place}: holds no conversation")
    if all(map(is_sharegpt, rows)):
        texts = of_sharegpt(rows, place)
    else:
        texts = [conversation_of(row, f"{place}, row {number}") for number, row in enumerate(rows, start=1)]
    return Conversations.of(texts, path.name if path.suffix in _FILES else source)


def conversation_of(row: Mapping[str, Any], place: str) -> Conversation:
    """One row. Raises DataError, with its place, where it is no conversation."""
    if isinstance(row, Mapping) and isinstance(row.get("turns"), list):
        turns = row["turns"]
        if turns and all(isinstance(turn, str) for turn in turns):
            return tuple(Message("user", turn) for turn in turns)
    if isinstance(row, Mapping) and isinstance(row.get("text"), str):
        return (Message("assistant", row["text"]),)
    listed = row.get("messages") or row.get("conversations") if isinstance(row, Mapping) else None
    if not isinstance(listed, list):
        keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
        raise DataError(f"{place}: expected messages, conversations, turns or text, found {keys}")
    found = [message_of(message) for message in listed]
    for message, one in zip(listed, found, strict=True):
        if one is None:
            raise DataError(
                f"{place}: a message needs a role ({', '.join(sorted(set(ROLES)))}) and a text, found {message!r:.80}"
            )
    whole = tuple(one for one in found if one is not None)
    spoken = [message for message in whole if message.role != "system"]
    if len(whole) > 1 and spoken and spoken[0].role == "assistant":
        raise DataError(f"{place}: begins with an answer; the first message but the system's is a user's")
    return whole


def _read(path: Path) -> str:
    if not path.is_file():
        raise ConfigError(f"conversations {str(path)!r}: no such file")
    return read_text(path)


def _read_json(path: Path) -> list[Any]:
    try:
        rows = parse_json(_read(path))
    except ValueError as error:
        raise DataError(f"{path}: damaged JSON ({error})") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a list of conversations")
    return rows
