"""Regular expressions of foreign configs: a stranger's pattern may take a second, not a day."""

import regex

from intactkv_eval.errors import CheckpointError

LONGEST = 1000  # characters
_SECONDS = 1.0


def check_pattern(text: str) -> str:
    """`text`. Raises ValueError for what is no regular expression, behind its mark (`re:`, `+:`, `-:`)."""
    if len(text) > LONGEST:
        raise ValueError(f"a pattern of {len(text)} characters")
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
