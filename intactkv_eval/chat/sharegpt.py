"""Rows of ShareGPT's layout as conversations: what its collectors left in them is tidied away, and counted.

    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}

An answer to nothing at the start and a question without an answer at the end are cut off; left out are rows with other
speakers, with two questions in a row, or without a message. Questions alone are kept where no row has an answer.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from intactkv_eval.chat.messages import Conversation, message_of, waits
from intactkv_eval.errors import DataError

logger = logging.getLogger(__name__)


def is_sharegpt(row: object) -> bool:
    """Whether a row has this layout."""
    return isinstance(row, Mapping) and isinstance(row.get("conversations"), list)


def of_sharegpt(rows: Sequence[Mapping[str, Any]], place: str) -> list[Conversation]:
    """The usable conversations of all rows; how many are not is logged. Raises DataError where none is."""
    found = [one for one in (_tidied(row["conversations"]) for row in rows) if one]
    answered = [one for one in found if any(message.role == "assistant" for message in one)]
    kept = answered or found
    if not kept:
        raise DataError(f"{place}: none of {len(rows)} rows is a conversation between `human` and `gpt`")
    if len(kept) < len(rows):
        logger.warning(
            "%s: %d of %d conversations are left out: empty, unanswered, or not between human and gpt in turns",
            place, len(rows) - len(kept), len(rows),
        )  # fmt: skip
    return kept


def _tidied(listed: list[Any]) -> Conversation:
    messages = [message_of(one) for one in listed]
    whole = [message for message in messages if message is not None]
    if len(whole) < len(messages):
        return ()
    systems = [message for message in whole if message.role == "system"]
    spoken = [message for message in whole if message.role != "system"]
    if systems and whole[: len(systems)] != systems:
        return ()
    while spoken and spoken[0].role == "assistant":
        spoken.pop(0)
    if any(message.role == "assistant" for message in spoken):
        while spoken[-1].role == "user":
            spoken.pop()
        if waits(tuple(spoken)):
            return ()
    return (*systems, *spoken) if spoken else ()
