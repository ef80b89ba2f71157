"""Why a context and a continuation leave nothing to score, for the error that says so.

lm_eval takes for a continuation's tokens those of both texts together behind as many as the context has alone. A
tokenizer that merges over the border may then leave none: of "a" and "b" it makes one token "ab". Its `hf` ends there
with an AssertionError, so there is no number that would be right.
"""

from collections.abc import Callable, Sequence
from typing import Any

from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.token_text import TokenText

_SHOWN = 40  # characters of a text in a message


def check_pairs(requests: Sequence[Any], encode: Callable[..., list[int]]) -> None:
    """Raise ConfigError for a request whose continuation is empty, or of which the tokenizer makes no token.

    requests: lm_eval's, of (context, continuation). encode: a text -> its tokens.
    """
    for request in requests:
        context, continuation = request.args
        if not continuation:
            raise ConfigError(f"task {request.task_name}: an empty continuation has no log-likelihood")
        if isinstance(continuation, TokenText) or context != "":
            continue
        if not encode(continuation, add_special_tokens=False):
            raise ConfigError(
                f"task {request.task_name}: the tokenizer makes no token of the continuation {continuation!r}, so it "
                "has no log-likelihood"
            )


def nothing_left(
    context: str, continuation: str, alone: Sequence[int], together: Sequence[int], decode: Callable[..., str]
) -> ConfigError:
    """The error for a continuation whose tokens are none. alone: those of the context; together: of both texts."""
    text = repr(continuation[:_SHOWN])
    if context == "":
        return ConfigError(
            f"the continuation {text} is the token that stands in front of every text, so behind an empty context "
            "nothing is left to score"
        )
    end = repr(context[-_SHOWN:])
    pairs = enumerate(zip(alone, together, strict=False))
    border = next((place for place, (one, other) in pairs if one != other), None)
    if border is None:
        return ConfigError(f"the tokenizer makes no token of the continuation {text} behind the context {end}")
    merged = decode(list(together[border:]), skip_special_tokens=False)
    return ConfigError(
        f"the continuation {text} has no token of its own behind the context {end}: the tokenizer merges both into "
        f"{merged!r}, so nothing is left to score. Separate them in the task (target_delimiter, or a space in front of "
        "each choice), or ask for the continuation together with the text in front of it"
    )
