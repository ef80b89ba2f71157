"""The judge behind an OpenAI-compatible API: messages in, a reply out.

Errors of the network and the server (429, 5xx, timeouts) are tried again by the openai package, with back-off and as
the server's Retry-After says. The key comes from the environment, is held by the client alone, and is struck out of
whatever a server sends back.
"""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import openai

from intactkv_eval.errors import ConfigError

KEY = "OPENAI_API_KEY"
_NO_KEY = "none"  # what a local server without keys is sent
_MOST_TOKENS = 10**9  # of one reply; what says more does not say
_A_KEY = 8  # letters; what is shorter is a local server's stand-in, and stands in texts by chance


_TRIED_AGAIN = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)


class NoReply(Exception):
    """The judge gave no usable reply; the message says why, without the key. final: the client has tried again."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True)
class Reply:
    """text: as it came. finish: why it ended. tokens: of the request and of the reply, None where it does not say."""

    text: str
    finish: str | None
    tokens: tuple[int, int] | None


@dataclass(frozen=True)
class Settings:
    """Of requests. seconds: until one is given up. rate: most requests a minute. retries: of one request."""

    model: str
    base_url: str | None = None
    most_tokens: int = 2048
    seconds: float = 120.0
    retries: int = 8
    rate: float | None = None


class Judge:
    """One model at one place. Used by several threads. Raises ConfigError where there is no key and one is needed."""

    def __init__(self, settings: Settings) -> None:
        key = os.environ.get(KEY)
        if not key and settings.base_url is None:
            raise ConfigError(f"{KEY} is not set; put the key into the environment, or name another server: --base-url")
        _check_url(settings.base_url)
        self.settings = settings
        self._key = key
        self._turn = threading.Lock()
        self._free = 0.0
        self._client = openai.OpenAI(
            api_key=key or _NO_KEY,
            base_url=settings.base_url,
            timeout=settings.seconds,
            max_retries=settings.retries,
        )

    def ask(self, messages: Sequence[tuple[str, str]]) -> Reply:
        """One reply, at temperature 0. Raises NoReply where none came, ConfigError where the server refuses the key."""
        self._wait()
        try:
            made = self._client.chat.completions.create(
                model=self.settings.model,
                messages=[{"role": role, "content": text} for role, text in messages],  # type: ignore[misc]
                temperature=0,
                max_tokens=self.settings.most_tokens,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConfigError(self.struck(f"the judge's server refuses: {error}")) from None
        except (openai.OpenAIError, ValueError) as error:
            raise NoReply(self.struck(f"{type(error).__name__}: {error}"), isinstance(error, _TRIED_AGAIN)) from None
        return self._read(made)

    def struck(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, f"[{KEY}]") if self._key and len(self._key) >= _A_KEY else text

    def _read(self, made: object) -> Reply:
        choices = getattr(made, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        text = getattr(message, "content", "")
        text = "" if text is None else text  # a refusal, or thoughts alone: a reply that says nothing
        if message is None or not isinstance(text, str):
            raise NoReply(self.struck(f"a reply without a text: {str(made)[:200]}"))
        usage = getattr(made, "usage", None)
        used = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
        known = all(isinstance(part, int) and 0 <= part <= _MOST_TOKENS for part in used)
        finish = getattr(choices[0], "finish_reason", None)  # type: ignore[index]
        finish = self._whole(finish) if isinstance(finish, str) else None
        return Reply(self._whole(text), finish, used if known else None)  # type: ignore[arg-type]

    def _whole(self, text: str) -> str:
        """Without the key, and without half a character that a server has sent."""
        return self.struck(text.encode("utf-8", "replace").decode("utf-8"))

    def _wait(self) -> None:
        """Until this thread's turn by `rate`."""
        if not self.settings.rate:
            return
        with self._turn:
            now = time.monotonic()
            at = max(now, self._free)
            self._free = at + 60 / self.settings.rate
        time.sleep(at - now)


def _check_url(url: str | None) -> None:
    """Raises ConfigError for an address that is none."""
    if url is None:
        return
    try:
        parts = urlsplit(url)
        whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        whole = False
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise ConfigError(f"--base-url: holds a user or password, which replies are kept with; put the key into {KEY}")
    if not whole:
        raise ConfigError(f"--base-url {url}: expected http://HOST:PORT/v1, PORT a number")
