"""The two ways in which judges are spoken to: OpenAI's chat completions and Anthropic's messages. Pure; sends nothing.

    OpenAI      POST chat/completions {model, messages, temperature, max_tokens}
    Anthropic   POST messages {model, system, messages, temperature, max_tokens}

Reasoning models refuse `max_tokens` and `temperature` with status 400 and a message that says so: OpenAI's want
`max_completion_tokens` and their own temperature. `Spelling.after` reads that message.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

_MOST_TOKENS = 10**9  # of one reply; a server that says more does not say
_MESSAGES = "/messages"
_TAKES_NONE = re.compile(
    r"temperature.{0,80}(not support|unsupported|deprecated|only the default)"
    r"|(not support|unsupported|deprecated).{0,40}temperature",
    re.IGNORECASE | re.DOTALL,
)
Messages = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Reply:
    """text: as it came. finish: why it ended. tokens: of the request and of the reply, None where it does not say.

    temperature: that was asked for, None where the judge takes none.
    """

    text: str
    finish: str | None
    tokens: tuple[int, int] | None
    temperature: float | None = 0.0


@dataclass(frozen=True)
class Spelling:
    """How this judge wants a request. limit: the name of the most tokens of a reply. temperature: None: not sent."""

    is_anthropic: bool = False
    limit: str = "max_tokens"
    temperature: float | None = 0.0

    def after(self, refusal: str) -> "Spelling | None":
        """The spelling that a server's 400 asks for; None where it complains of something else."""
        if self.limit == "max_tokens" and "max_completion_tokens" in refusal:
            return replace(self, limit="max_completion_tokens")
        if self.temperature is not None and _TAKES_NONE.search(refusal):
            return replace(self, temperature=None)
        return None

    @property
    def path(self) -> str:
        """Below the server's address."""
        return _MESSAGES if self.is_anthropic else "/chat/completions"

    def body(self, model: str, messages: Messages, max_tokens: int) -> dict[str, Any]:
        """What is sent."""
        system = "\n\n".join(text for role, text in messages if role == "system") if self.is_anthropic else ""
        listed = [{"role": role, "content": text} for role, text in messages if not (system and role == "system")]
        return {
            "model": model,
            **({"system": system} if system else {}),
            "messages": listed,
            self.limit: max_tokens,
            **({} if self.temperature is None else {"temperature": self.temperature}),
        }

    def read(self, data: object) -> Reply | None:
        """The reply in a server's JSON; None where it holds none. A refusal, or thoughts alone, are an empty text."""
        return self._of_anthropic(data) if self.is_anthropic else self._of_openai(data)

    def _of_openai(self, data: object) -> Reply | None:
        first = _item(_get(data, "choices"), 0)
        message = _get(first, "message")
        if not isinstance(message, Mapping):
            return None
        text = message.get("content")
        if text is not None and not isinstance(text, str):
            return None
        usage = _get(data, "usage")
        tokens = _tokens(_get(usage, "prompt_tokens"), _get(usage, "completion_tokens"))
        return Reply(text or "", _text(_get(first, "finish_reason")), tokens, self.temperature)

    def _of_anthropic(self, data: object) -> Reply | None:
        parts = _get(data, "content")
        if not isinstance(parts, list):
            return None
        texts = [_get(part, "text") for part in parts if _get(part, "type") == "text"]
        if not all(isinstance(text, str) for text in texts):
            return None
        usage = _get(data, "usage")
        tokens = _tokens(_get(usage, "input_tokens"), _get(usage, "output_tokens"))
        return Reply("".join(map(str, texts)), _text(_get(data, "stop_reason")), tokens, self.temperature)


def speaks_anthropic(url: str | None) -> bool:
    """Whether an address is of Anthropic's Messages API: its own host, or a path that ends with /messages."""
    if url is None:
        return False
    parts = urlsplit(url)
    return f".{parts.hostname or ''}".endswith(".anthropic.com") or parts.path.rstrip("/").endswith(_MESSAGES)


def anthropic_base(url: str) -> str:
    """The address in front of /messages; Anthropic's own host may be named without its /v1."""
    base = url.rstrip("/").removesuffix(_MESSAGES)
    return base if urlsplit(base).path.strip("/") else f"{base}/v1"


def _get(value: object, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else None


def _item(value: object, place: int) -> Any:
    return value[place] if isinstance(value, list) and len(value) > place else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _tokens(asked: object, replied: object) -> tuple[int, int] | None:
    for part in (asked, replied):
        if not isinstance(part, int) or isinstance(part, bool) or not 0 <= part <= _MOST_TOKENS:
            return None
    return asked, replied  # type: ignore[return-value]
