"""Regular expressions of foreign configs: a stranger's pattern may take a second, not a day."""

import math
import re

import regex

from intactkv_eval.errors import CheckpointError

LONGEST = 1000  # characters
MOST_REPEATS = 1000  # of all counts of a pattern multiplied: what is repeated is written out when it is compiled
_SECONDS = 1.0
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
    """Whether the name begins with what the pattern describes. Raises CheckpointError where that takes too long."""
    try:
        return regex.match(pattern, name, timeout=_SECONDS) is not None
    except TimeoutError:
        raise CheckpointError(
            f"quantization_config: pattern {pattern[:80]!r} takes over {_SECONDS:g} s on {name}; write a simpler one"
        ) from None
