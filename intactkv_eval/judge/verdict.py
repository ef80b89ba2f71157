"""What a reply says: a rating from 1 to 10, or a winner; or nothing, which is never taken for a number.

    single     [[7]], else [7]
    pairwise   [[A]], [[B]], or [[C]] for a tie

The order of looking for ratings is FastChat's own. A rating outside of 1 to 10 is none here, nor are two different
winners in one reply, of which FastChat takes the first letter.
"""

import re

_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"\[(\d+(?:\.\d*)?)\]"))
_WINNERS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}


def rating_of(reply: str) -> float | None:
    """The first rating of a reply, None where there is none in range."""
    found = next((match for match in (pattern.search(reply) for pattern in _RATINGS) if match), None)
    rating = float(found.group(1)) if found else None
    return rating if rating is not None and 1 <= rating <= 10 else None


def winner_of(reply: str) -> str | None:
    """`A`, `B` or `tie`, None where the reply names none."""
    named = [winner for mark, winner in _WINNERS.items() if mark in reply]
    return named[0] if len(named) == 1 else None


def verdict_of(kind: str, reply: str) -> float | str | None:
    """Of a single or pairwise reply."""
    return rating_of(reply) if kind == "single" else winner_of(reply)
