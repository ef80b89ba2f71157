"""What a reply says: a rating from 0 to 10, or a winner; or nothing, which is never taken for a number.

    single     the first [[7]]; where there is none, the last [7] that is a rating and no index or citation
    pairwise   [[A]], [[B]], or [[C]] for a tie

FastChat takes the first number in single brackets wherever it stands, any number, and the first letter of two winners.
Here a number in single brackets counts where it stands behind a word for a rating in the same sentence, or alone on its
line, and not inside of quoted code; a number above 10 and a reply that names two winners are no verdicts. A 0 is one,
as for FastChat: judges give it to an empty answer.
"""

import re

_NUMBER = r"\d+(?:\.\d*)?"
_DOUBLE = re.compile(rf"\[\[({_NUMBER})\]\]")
_INDEXED = r"(?<![\w)\]\"'])"  # nums[5], f(x)[0], "text"[1]
_SINGLE = re.compile(
    # The rating is [7].   Score: [7]   **Rating:** [6.5]   I would rate it a [8]
    rf"\b(?:rat(?:e|ed|es|ing|ings)|scor(?:e|ed|es|ing)|grad(?:e|ed|es|ing)|verdict)\b[^\[\].!?;]{{0,60}}{_INDEXED}\[({_NUMBER})\]"
    # I would give this answer a [7].
    rf"|\b(?:give|gives|gave|award|awards|assign|assigns)\b[^\[\].!?;]{{0,60}}{_INDEXED}\[({_NUMBER})\](?=[\s.!*_]*(?:\n|$))"
    # a line that holds nothing else
    rf"|^[ \t>*_#-]*\[({_NUMBER})\](?:/10)?[ \t.!*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_QUOTED = re.compile(rf"`(?!\[{_NUMBER}\]`)[^`\n]*`")
_WINNERS = {"[[A]]": "A", "[[B]]": "B", "[[C]]": "tie"}
WINNERS = frozenset(_WINNERS.values())
MAX_RATING = 10


def rating_of(reply: str) -> float | None:
    """The rating of a reply, None where it holds none or one above 10."""
    double = _DOUBLE.search(reply)
    found = double.group(1) if double else _single_bracket(reply)
    rating = float(found) if found else None
    return rating if is_rating(rating) else None


def _single_bracket(reply: str) -> str | None:
    """The last number in single brackets that is a rating by where it stands."""
    prose = _QUOTED.sub(" ", _FENCED.sub("\n", reply)).replace("`", "")
    found = None
    for match in _SINGLE.finditer(prose):
        found = next(number for number in match.groups() if number is not None)
    return found


def is_rating(value: object) -> bool:
    """Whether it is a number from 0 to 10."""
    return isinstance(value, int | float) and 0 <= value <= MAX_RATING


def winner_of(reply: str) -> str | None:
    """`A`, `B` or `tie`, None where the reply names none, or more than one."""
    named = [winner for mark, winner in _WINNERS.items() if mark in reply]
    return named[0] if len(named) == 1 else None


def verdict_of(kind: str, reply: str) -> float | str | None:
    """Of a single or pairwise reply."""
    return rating_of(reply) if kind == "single" else winner_of(reply)
