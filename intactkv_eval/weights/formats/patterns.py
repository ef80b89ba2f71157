"""Regular expressions of foreign configs: a stranger's pattern may take a second, not a day."""

import math
import re
import time

import regex

from intactkv_eval.errors import CheckpointError

LONGEST = 1000  # characters
MOST_REPEATS = 1000  # of all counts of a pattern multiplied: what is repeated is written out when it is compiled
_SECONDS = 1.0
_SLOW = 0.01  # seconds; an honest pattern takes microseconds
_spent: list[float] = []  # by slow ones, since the last that was refused
_COUNT = re.compile(r"\{([0-9]*),?([0-9]*)\}")
# A call of a group, of itself among them, needs no end; verbose patterns (?x) may hide a call or a count in spaces.
_CALL_OR_VERBOSE = re.compile(r"\(\?(?:R|[+-]?[0-9]|&|P[>&]|[a-zA-Z0-9]*x)")


def check_pattern(text: str) -> str:
    """`text`. Raises ValueError for what is no regular expression, behind its mark (`re:`, `+:`, `-:`).

    Also, before it is compiled, for what would take gigabytes: calls of groups, and counts that multiply.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a pattern of {len(text)} characters")
    if found := _CALL_OR_VERBOSE.search(text):
        raise ValueError(f"a pattern with {found[0]!r}: groups that are called, and (?x), are not read; write it out")
    counts = [max(1, *(int(part or 0) for part in found.groups())) for found in _COUNT.finditer(text)]
    if math.prod(counts) > MOST_REPEATS:
        raise ValueError(f"a pattern whose counts multiply to more than {MOST_REPEATS} repeats; write a simpler one")
    try:
        regex.compile(text.removeprefix("-:").removeprefix("+:").removeprefix("re:"))
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"no regular expression ({error})") from None
    return text


def matches(pattern: str, name: str) -> bool:
    """Whether the name begins with what the pattern describes.

    Raises CheckpointError where that takes too long, or where all slow ones together have.
    """
    begun = time.thread_time()  # of this thread's own work: a busy machine makes no pattern slow
    try:
        found = regex.match(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise CheckpointError(_too_slow(pattern, name)) from None
    taken = time.thread_time() - begun
    if taken > _SLOW:
        _spent.append(taken)
    if sum(_spent) > _SECONDS:
        _spent.clear()
        raise CheckpointError(_too_slow(pattern, name))
    return found


def _too_slow(pattern: str, name: str) -> str:
    return (
        f"quantization_config: pattern {pattern[:80]!r} takes over {_SECONDS:g} s on {name}, or those before it have; "
        "write simpler ones"
    )
