"""A tokenizer.json is a small program: what it may do to a text, looked at before the tokenizers library builds it.

Normalizers and decoders replace, so that a few steps make gigabytes of a short text; a template may repeat what was
encoded; a table has as many rows as its highest id. The library aborts the process where its memory ends. The section
`model`, which is nearly all of a file, is read only where it may matter.
"""

import json
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from intactkv_eval.assemble.tokenizer_expressions import endless_expression
from intactkv_eval.compat.transformers_api import file_of
from intactkv_eval.errors import CheckpointError
from intactkv_eval.storage.limits import (
    EXPRESSION_SECONDS,
    TOKEN_ID,
    TOKENIZER_BYTES,
    TOKENIZER_GROWTH,
    TOKENIZER_STEPS,
    TOKENIZER_TEXT,
    read_bytes,
)

_LONG_NUMBER = re.compile(rb"[:,\[]\s*\d{8,}")  # without which there is no id that is too high
_STEP = re.compile(rb'"type"\s*:\s*"(Replace|Split|Prepend|TemplateProcessing|Precompiled|Sequence)"')
_ESCAPED = re.compile(rb"\\u00[2-7]")  # a name of a step may be written so
_DIGITS = bytes.maketrans(b"123456789", b"0" * 9)
_KINDS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}
_NO_WIDTH = re.compile(r"\(\?<?[=!]|\\[bBKGzZA]|[\^$]")  # by which an expression may find an empty text within another
_BLANK = re.compile(r"[\s:,]*")


def check_tokenizer(pretrained: str, revision: str) -> None:
    """Raise CheckpointError for a tokenizer.json that no text should meet.

    That is one with ids that no vocabulary has, steps that make texts grow, or regular expressions that take too long.
    What is damaged otherwise is left to the tokenizers library.
    """
    content = b""
    with suppress(OSError):
        path = file_of(pretrained, "tokenizer.json", revision)
        try:
            content = b"" if path is None else read_bytes(path, TOKENIZER_BYTES)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
    expressions: list[str] = []
    with suppress(ValueError, RecursionError):
        for key, value in _sections(content.decode("utf-8"), _has_long_number(content)):
            if key in _KINDS and isinstance(value, dict):
                expressions += _check_steps(pretrained, key, value)
            if key in {"model", "added_tokens"}:
                _check_ids(pretrained, value)
    slow = endless_expression(tuple(dict.fromkeys(expressions)))
    if slow is not None:
        raise CheckpointError(
            f"{pretrained}: tokenizer.json has the regular expression {slow[:200]!r}, on which a short text takes "
            f"more than {EXPRESSION_SECONDS} s or makes the tokenizers library fail; expected one that is read in "
            "one pass"
        )


def _sections(text: str, whole: bool) -> Iterator[tuple[str, Any]]:
    """The keys and values of the document; `model` and what follows it only where that may matter, or `whole`."""
    read = json.JSONDecoder(parse_int=lambda digits: int(digits[:24])).raw_decode  # Python refuses thousands of digits
    place = text.index("{") + 1
    while True:
        place = _after_blank(text, place)
        if text[place : place + 1] != '"':
            return
        key, place = read(text, place)
        place = _after_blank(text, place)
        if key == "model" and not whole and not _has_steps(text[place:].encode()):
            return
        value, place = read(text, place)
        yield str(key), value


def _has_long_number(content: bytes) -> bool:
    """Whether `_LONG_NUMBER` is there; where no eight digits stand together, that is known at once."""
    return b"0" * 8 in content.translate(_DIGITS) and _LONG_NUMBER.search(content) is not None


def _has_steps(content: bytes) -> bool:
    """Two searches, each for a text that they begin with, are ten times as fast as one for either."""
    return _STEP.search(content) is not None or _ESCAPED.search(content) is not None


def _after_blank(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    return place if found is None else found.end()


def _check_ids(pretrained: str, found: Any) -> None:
    """Of the section `model`, or of `added_tokens`."""
    vocabulary = found.get("vocab") if isinstance(found, dict) else None
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [token.get("id") for token in found if isinstance(token, dict)] if isinstance(found, list) else []
    worst = max((token for token in ids if isinstance(token, int)), default=0)
    if worst > TOKEN_ID:
        raise CheckpointError(
            f"{pretrained}: tokenizer.json has the token id {str(worst)[:20]}; expected at most {TOKEN_ID}"
        )


def _check_steps(pretrained: str, section: str, value: Mapping[str, Any]) -> list[str]:
    """The regular expressions of a section's steps.

    Raises CheckpointError where they are too many, or grow a text beyond the limits.
    """
    steps = list(_steps(value, _KINDS[section]))
    if len(steps) > TOKENIZER_STEPS:
        raise CheckpointError(
            f"{pretrained}: tokenizer.json has more than {TOKENIZER_STEPS} steps in its {section}; expected a few"
        )
    growth = 1.0
    for step in steps:
        growth = min(1e300, growth * _growth(step))
        put_in = _put_in(step)
        if put_in > TOKENIZER_TEXT:
            raise CheckpointError(
                f"{pretrained}: tokenizer.json puts {put_in:,} characters or tokens in front of a text ({section}); "
                f"expected at most {TOKENIZER_TEXT:,}"
            )
    if growth > TOKENIZER_GROWTH:
        raise CheckpointError(
            f"{pretrained}: the {section} of tokenizer.json makes up to {growth:.3g} characters of one, which fills "
            f"the memory; expected at most {TOKENIZER_GROWTH:,}"
        )
    patterns = (step.get("pattern") for step in steps)
    found = (pattern.get("Regex") for pattern in patterns if isinstance(pattern, dict))
    return [expression for expression in found if isinstance(expression, str)]


def _steps(value: Any, inside: str) -> Iterator[Mapping[str, Any]]:
    """The steps, those of sequences in their place."""
    waiting, count = [value], 0
    while waiting and count <= TOKENIZER_STEPS:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        parts = step.get(inside)
        if isinstance(parts, list):
            waiting += parts
            continue
        count += 1
        yield step


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters (of a template, tokens) a step makes of one, at most."""
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        pattern = step.get("pattern")
        return _replaced(pattern if isinstance(pattern, dict) else {}, len(content))
    if kind == "TemplateProcessing":
        return max((_repeats(step.get(key)) for key in ("single", "pair")), default=1)
    charsmap = step.get("precompiled_charsmap")
    if kind == "Precompiled" and isinstance(charsmap, str):
        blob = b64decode(charsmap)
        return max([1, *map(len, blob[4 + int.from_bytes(blob[:4], "little") :].split(b"\0"))])
    return 1


def _replaced(pattern: Mapping[str, Any], length: int) -> float:
    """What is put in for each character of what is found; in between all of them where nothing can be found."""
    text, expression = pattern.get("String"), pattern.get("Regex")
    if isinstance(text, str) and text:
        return max(1.0, length / len(text))
    with suppress(re.error, OverflowError):
        if (
            isinstance(expression, str)
            and re.compile(expression).match("") is None
            and not _NO_WIDTH.search(expression)
        ):
            return max(1.0, float(length))
    return 1.0 + length


def _repeats(pieces: Any) -> int:
    """How often a template has the text, or one of two."""
    listed = pieces if isinstance(pieces, list) else []
    found = Counter(str(piece["Sequence"].get("id")) for piece in listed
                    if isinstance(piece, dict) and isinstance(piece.get("Sequence"), dict))  # fmt: skip
    return max(found.values(), default=1)


def _put_in(step: Mapping[str, Any]) -> int:
    """Characters or tokens that a step puts in once."""
    if step.get("type") == "Prepend":
        return len(str(step.get("prepend", "")))
    special = step.get("special_tokens")
    if step.get("type") != "TemplateProcessing" or not isinstance(special, dict):
        return 0
    held = {name: one.get("ids") for name, one in special.items() if isinstance(one, dict)}
    sizes = {name: len(ids) for name, ids in held.items() if isinstance(ids, list)}
    lists = [step[key] for key in ("single", "pair") if isinstance(step.get(key), list)]
    pieces = [piece for one in lists for piece in one if isinstance(piece, dict)]
    named = (piece["SpecialToken"].get("id") for piece in pieces if isinstance(piece.get("SpecialToken"), dict))
    return sum(sizes.get(str(name), 0) for name in named)
