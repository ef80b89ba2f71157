"""The judge behind a server: messages in, a reply out, one request at a time of each thread.

`send` makes one attempt and says of a failure whether it may pass (429, 5xx, the network), after how long, and whether
the server may bill it; who retries is run.py, which knows what it may spend. The key comes from the environment, is
held by the client alone, and is struck out of whatever a server sends back.
"""

import os
import threading
import time
from dataclasses import dataclass, replace
from enum import Enum, auto
from urllib.parse import urlsplit

import openai

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.wire import Messages, Reply, Spelling, anthropic_base, speaks_anthropic

KEY, ANTHROPIC_KEY = "OPENAI_API_KEY", "ANTHROPIC_API_KEY"
_VERSION = "2023-06-01"  # of Anthropic's API
_NO_KEY = "none"  # what a local server without keys is sent
_A_KEY = 8  # letters; what is shorter is a local server's stand-in, and stands in texts by chance
_LONGEST_WAIT = 60.0  # seconds that a server may ask for
_REFUSED = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
_PASSING = {408, 409, 425, 429}  # and all of 500 and above
_UNSENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}  # of the HTTP library: the server has heard nothing


class Failure(Enum):
    """passing: worth the same request again. unreadable: answered, but not so that it can be read. final: neither."""

    PASSING = auto()
    UNREADABLE = auto()
    FINAL = auto()


class NoReply(Exception):
    """The judge gave no usable reply; the message says why, without the key.

    is_billed: the server may have worked, and want to be paid. delay: seconds that the server asks to wait.
    """

    def __init__(self, message: str, kind: Failure, is_billed: bool = False, delay: float | None = None) -> None:
        super().__init__(message)
        self.kind, self.is_billed, self.delay = kind, is_billed, delay


@dataclass(frozen=True)
class JudgeServer:
    """The judge and its server: where requests go, and how.

    Args:
        model: The judge, as the server names it.
        base_url: The server; None for OpenAI's.
        max_tokens: The largest number of tokens of a reply.
        timeout: Seconds until a request is given up.
        retries: Retries of a request that the server or the network fails.
        requests_per_minute: The largest number of requests a minute; None for no limit.
    """

    model: str
    base_url: str | None = None
    max_tokens: int = 2048
    timeout: float = 120.0
    retries: int = 8
    requests_per_minute: float | None = None


class Judge:
    """One model at one place. Used by several threads. Raises ConfigError where there is no key and one is needed."""

    def __init__(self, settings: JudgeServer) -> None:
        _check_url(settings.base_url)
        self.settings = settings
        self.spelling = Spelling(is_anthropic=speaks_anthropic(settings.base_url))
        self._name = ANTHROPIC_KEY if self.spelling.is_anthropic else KEY
        self._key = os.environ.get(self._name)
        if not self._key and settings.base_url is None:
            raise ConfigError(f"{KEY} is not set; put the key into the environment, or name another server: --base-url")
        self._turn = threading.Lock()
        self._free = 0.0
        anthropic = self.spelling.is_anthropic
        self._headers = _anthropic_headers(self._key or _NO_KEY) if anthropic else {}
        self._client = openai.OpenAI(
            api_key=self._key or _NO_KEY,
            base_url=anthropic_base(settings.base_url or "") if anthropic else settings.base_url,
            timeout=settings.timeout,
            max_retries=0,
        )

    def send(self, messages: Messages) -> Reply:
        """One reply, at temperature 0 where the judge takes one.

        Raises NoReply where none came, ConfigError where the server refuses the key or knows no such model.
        """
        self._wait()
        spelling = self.spelling
        while True:
            body = spelling.body(self.settings.model, messages, self.settings.max_tokens)
            try:
                data = self._client.post(spelling.path, cast_to=object, body=body, options={"headers": self._headers})
            except openai.BadRequestError as error:
                other = spelling.after(str(error))
                if other is None:
                    raise self._failed(error) from None
                spelling = other
                continue
            except _REFUSED as error:
                raise ConfigError(self.struck(f"the judge's server refuses: {error}")) from None
            except (openai.OpenAIError, ValueError) as error:
                raise self._failed(error) from None
            self.spelling = spelling  # with which it answered
            reply = spelling.read(data)
            if reply is None:
                said = self.struck(f"a reply without a text: {str(data)[:200]}")
                raise NoReply(said, Failure.UNREADABLE, is_billed=True)
            finish = None if reply.finish is None else self._whole(reply.finish)
            return replace(reply, text=self._whole(reply.text), finish=finish)

    def struck(self, text: str) -> str:
        """The text without the key."""
        return text.replace(self._key, f"[{self._name}]") if self._key and len(self._key) >= _A_KEY else text

    def _failed(self, error: Exception) -> NoReply:
        message = self.struck(f"{type(error).__name__}: {error}")
        if isinstance(error, openai.APIStatusError):
            passing = error.status_code in _PASSING or error.status_code >= 500
            return NoReply(message, Failure.PASSING if passing else Failure.FINAL, delay=_delay(error.response.headers))
        if isinstance(error, openai.APIConnectionError):
            is_billed = type(error.__cause__).__name__ not in _UNSENT
            return NoReply(message, Failure.PASSING, is_billed)
        return NoReply(message, Failure.UNREADABLE, is_billed=True)

    def _whole(self, text: str) -> str:
        """Without the key, and without half a character that a server has sent."""
        return self.struck(text.encode("utf-8", "replace").decode("utf-8"))

    def _wait(self) -> None:
        """Until this thread's turn by `rate`."""
        if not self.settings.requests_per_minute:
            return
        with self._turn:
            now = time.monotonic()
            at = max(now, self._free)
            self._free = at + 60 / self.settings.requests_per_minute
        time.sleep(at - now)


def _anthropic_headers(key: str) -> dict[str, str | openai.Omit]:
    """In place of OpenAI's own, which carry the key as a bearer's."""
    return {"Authorization": openai.Omit(), "X-Api-Key": key, "anthropic-version": _VERSION}


def _delay(headers: object) -> float | None:
    """Seconds that a server asks to wait; None where it does not say, or asks for more than a minute."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name)) * unit  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            continue
        if 0 <= seconds <= _LONGEST_WAIT:
            return seconds
    return None


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
