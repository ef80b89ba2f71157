"""What a text may hold before it is shown, logged or recorded: no control characters, no credentials.

A name, a path or an error may come from a stranger's file. `clean` is what every message goes through: errors
(errors.py), log records (`clean_logs`) and what the commands print. Knows texts and plain values only.
"""

import logging
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

STRUCK = "[credential struck out]"
_SHORT = 200  # letters of a text that is likely to come again

# Sequences that a terminal obeys: CSI to its end, of others (titles, links) the two letters that begin them.
_ESCAPES = re.compile("(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[ -/]*[0-~]")
# C0 but tab and line feed, DEL, C1; marks, embeddings, overrides and isolates of the writing direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")  # ends of lines to one program or another
_LINES = re.compile("[\t\n]+")

_SECRET_KEYS = "token|password|passwd|api_?key|secret|authorization|access_token|auth_token|hf_token|use_auth_token"
_IS_SECRET = re.compile(f"(?:{_SECRET_KEYS})", re.IGNORECASE)
_CREDENTIALS = re.compile(
    "(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{30,}"
    "|github_pat_[A-Za-z0-9_]{30,}|sk-(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|AKIA[A-Z0-9]{16}"
    "|eyJ[A-Za-z0-9_-]{10,}\\.[A-Za-z0-9_-]{10,}\\.[A-Za-z0-9_-]{10,})"
)
_USER = re.compile("(?<=://)[^/\\s\"'<>]+@")  # user and password in front of a host
_BEARER = re.compile("(?i)\\b(bearer|basic)\\s+[A-Za-z0-9._~+/=-]{12,}")
# key=value, "key": "value", and of all but token also key: value; a number, and a word of Python, is none
_NAMED = re.compile(
    f"(?i)(?<![A-Za-z0-9_-])((?:{_SECRET_KEYS})=[\"']?|[\"'](?:{_SECRET_KEYS})[\"']\\s*[:=]\\s*[\"']"
    "|(?:password|passwd|api_?key|secret|authorization):\\s*)"
    "(?!(?:true|false|none|null)\\b|[0-9.]+\\b|\\[|bearer\\b|basic\\b)([^\\s,;\"'&)}\\]]{6,})"
)
# torch's error for a pickle that holds more than tensors tells how to read it all the same, code included.
_UNSAFE_ADVICE = re.compile("Weights only load failed.*|[^\n]*weights_only[^\n]*", re.DOTALL)
_REFUSED_PICKLE = (
    "it is a pickle that is damaged, or holds more than tensors and plain containers, which could run code when it is "
    "read; ask for the weights as safetensors"
)


def without_controls(text: str) -> str:
    """The text without what a terminal obeys: escape sequences, C0 and C1, marks of the writing direction.

    Tabs and line feeds stay; other ends of lines become spaces.
    """
    return _CONTROLS.sub("", _BREAKS.sub(" ", _ESCAPES.sub("", text)))


def on_one_line(text: str) -> str:
    """`without_controls`, with spaces in the place of tabs and line feeds: for the cell of a table."""
    return _LINES.sub(" ", without_controls(text))


def is_secret_key(key: str) -> bool:
    """Whether a value under this name is a credential, whatever it looks like."""
    return _IS_SECRET.fullmatch(key.replace("-", "_")) is not None


def struck(text: str) -> str:
    """The text without what looks like a credential: tokens of hubs and APIs, `user:password@` of an address, and the
    values of keys such as token, password, api_key, secret and authorization.
    """
    return _struck_short(text) if len(text) <= _SHORT else _struck(text)


def _struck(text: str) -> str:
    text = _USER.sub(f"{STRUCK}@", text)
    text = _NAMED.sub(lambda found: f"{found[1]}{STRUCK}", text)
    text = _BEARER.sub(lambda found: f"{found[1]} {STRUCK}", text)
    return _CREDENTIALS.sub(STRUCK, text)


_struck_short = lru_cache(maxsize=4096)(_struck)  # the records of a folder say the same again and again


def struck_record(value: Any) -> Any:
    """A document of plain values in which every text is `struck`, and every text under a name of a credential."""
    if isinstance(value, str):
        return struck(value)
    if isinstance(value, Mapping):
        return {
            key: STRUCK if isinstance(part, str) and part and is_secret_key(str(key)) else struck_record(part)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        parts = [struck_record(part) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    return value


def clean(text: str) -> str:
    """What may be shown of a text: `without_controls`, `struck`, and without torch's advice to trust a pickle."""
    if "weights_only" in text:
        text = _UNSAFE_ADVICE.sub(_REFUSED_PICKLE, text, count=1)
    return struck(without_controls(text))


def say(text: object, err: bool = False) -> None:
    """Print a message of a command, `clean`. err: on standard error."""
    shown = clean(str(text)).encode("utf-8", "backslashreplace").decode()  # a name of a file may be no UTF-8
    print(shown, file=sys.stderr if err else sys.stdout, flush=True)


def clean_logs() -> None:
    """From now on every log record of this process has a `clean` message, whoever logs it. Does nothing twice."""
    before = logging.getLogRecordFactory()
    if getattr(before, "is_clean", False):
        return

    def made(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = before(*arguments, **named)
        message = record.getMessage

        def get_message() -> str:
            return clean(message())

        record.getMessage = get_message  # type: ignore[method-assign]
        return record

    made.is_clean = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)
