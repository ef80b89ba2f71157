"""Regular expressions of a tokenizer.json: tried on short texts, in a child process, before a task's texts meet them.

The tokenizers library searches by Oniguruma, which gives up after ten million steps from one place of a text: then the
library panics. Short of that, each place may take a tenth of a second. An expression that does so on 256 equal
characters would stop any run; those of published tokenizers take a few milliseconds for all texts that are tried here.
The child itself takes twenty, so what the largest families of models have is known to be fast.
"""

import re
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache

from tokenizers import Regex, pre_tokenizers

from intactkv_eval.storage.child_process import result_of_child
from intactkv_eval.storage.limits import EXPRESSION_SECONDS, TEMPLATE_BYTES

_LENGTH = 256  # of a text; what takes the cube of it, or more, takes too long
_KINDS = "aA1 \n!'-_é中"
_LITERALS = 16  # characters and runs of an expression that are tried beside these
_RUN = re.compile(r"\w+")
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KNOWN = {
    rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",  # GPT-4, Llama 3
    rf"{_LETTERS}|\p{{N}}|{_REST}",  # Qwen 2 and 3
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",  # GPT-2
    r"\p{N}{1,3}",  # DeepSeek V3
    "[一-龥\u3040-ゟ゠-ヿ]+",
    " {2,}",  # SentencePiece's
}
"""Expressions of published tokenizers that are known to be fast."""


@lru_cache(maxsize=64)
def endless_expression(expressions: tuple[str, ...]) -> str | None:
    """The first of the expressions that takes too long; None where all are fast, or no expressions to the library."""
    strange = tuple(expression for expression in expressions if expression not in KNOWN)
    if not strange:
        return None
    found = result_of_child(lambda: {"slow": first_slow(strange)}, EXPRESSION_SECONDS, TEMPLATE_BYTES)
    slow: str | None = strange[0] if found is None else found["slow"]
    return slow


def first_slow(expressions: Iterable[str]) -> str | None:
    """`endless_expression` in this process."""
    for expression in expressions:
        begun = time.process_time()
        try:
            split = pre_tokenizers.Split(Regex(expression), "isolated")
        except Exception:  # noqa: BLE001  the library says so itself, where it reads the whole file
            continue
        try:
            for text in _texts(expression):
                split.pre_tokenize_str(text)
                if time.process_time() - begun > EXPRESSION_SECONDS / 2:
                    return expression
        except BaseException:  # noqa: BLE001  its panic is no Exception
            return expression
    return None


def _texts(expression: str) -> Iterator[str]:
    """Of equal parts: what expressions are slow on. Of each one that ends so, one that ends otherwise, and one behind
    which the expression's own characters stand, without which the library may not begin to search.
    """
    literals = dict.fromkeys([*expression, *_RUN.findall(expression)])
    ends = ("", "\x00", f"\x00\n{expression[:_LENGTH]}")
    for part in dict.fromkeys([*_KINDS, *list(literals)[: 4 * _LITERALS]]):
        for end in ends:
            yield part * (_LENGTH // len(part)) + end
