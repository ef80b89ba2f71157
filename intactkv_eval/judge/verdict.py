"""What a reply says: a rating from 1 to 10, or a winner; or nothing, which is never taken for a number.

    single     [[7]], else `rating: [7]`
    pairwise   [[A]], [[B]], or [[C]] for a tie

FastChat takes any number in brackets where there are no double ones, `nums[5]` of a quoted program among them, and the
first letter of two winners; here these are no verdicts, nor is a rating outside of 1 to 10.
"""

import re

_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d*)?)\]\]"), re.compile(r"rating\W{0,4}\[(\d+(?:\.\d*)?)\]", re.IGNORECASE))
_WINNERS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
WINNERS = frozenset(_WINNERS.values())


def rating_of(reply: str) -> float | None:
    """The first rating of a reply, None where there is none in range."""
    found = next((match for match in (pattern.search(reply) for pattern in _RATINGS) if match), None)
    rating = float(found.group(1)) if found else None
    return rating if is_rating(rating) else None


def is_rating(value: object) -> bool:
    """Whether it is a number from 1 to 10."""
    return isinstance(value, int | float) and 1 <= value <= 10


def winner_of(reply: str) -> str | None:
    """`A`, `B` or `tie`, None where the reply names none."""
    named = [winner for mark, winner in _WINNERS.items() if mark in reply]
    return named[0] if len(named) == 1 else None


def verdict_of(kind: str, reply: str) -> float | str | None:
    """Of a single or pairwise reply."""
    return rating_of(reply) if kind == "single" else winner_of(reply)
