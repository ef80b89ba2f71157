"""Prompts of a chat template, which may be a stranger's program: written in a child process, bound in time and memory.

The child runs the template and nothing else, so it is safe beside threads and a GPU; what it made comes back as JSON.
"""

import json
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2

from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.errors import PivotError
from intactkv_eval.storage.limits import TEMPLATE_BYTES, TEMPLATE_CHARACTERS, TEMPLATE_SECONDS

_WALL_SECONDS = 60.0  # a child that does not even start


def prompts_of(tokenizer: Any, messages: Sequence[str], chat: ChatSettings) -> list[str]:
    """The prompt of each first user message. Raises PivotError where the template fails, or does not end."""
    return prompts_of_chats(tokenizer, [[{"role": "user", "content": message}] for message in messages], [chat])


def prompts_of_chats(
    tokenizer: Any, talks: Sequence[Sequence[dict[str, str]]], settings: Sequence[ChatSettings]
) -> list[str]:
    """The prompt of each conversation with the first of `settings`, then of each with the second, and so on.

    Raises PivotError where the template fails, does not end, or writes what no prompt is.
    """

    def write() -> list[str]:
        return [chat.render(tokenizer, talk, invite=True) for chat in settings for talk in talks]

    try:
        found = json.loads(_of_child(lambda: _outcome(write)))
    except ValueError:  # nothing, or half of it: the child was ended
        found = {}
    if "prompts" not in found:
        reason = found.get("error") or f"more than {TEMPLATE_SECONDS} s or {TEMPLATE_BYTES >> 20} MiB"
        raise PivotError(f"pivot=prompt: the chat template fails on a user message: {reason}")
    return list(found["prompts"])


def _outcome(write: Callable[[], list[str]]) -> dict[str, Any]:
    try:
        prompts = write()
    except (jinja2.exceptions.TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    longest = max(map(len, prompts))
    if longest > TEMPLATE_CHARACTERS:
        return {"error": f"it writes {longest} characters, at most {TEMPLATE_CHARACTERS} are a prompt"}
    return {"prompts": prompts}


def _of_child(work: Callable[[], dict[str, Any]]) -> str:
    """The JSON of `work`'s result, from a child process; nothing where the child did not end by itself."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child uses no lock of theirs
        child = os.fork()
    if not child:
        try:
            _bind()
            with os.fdopen(writing, "w") as out:
                json.dump(work(), out)
        finally:
            os._exit(0)  # without what the parent would do on its way out
    os.close(writing)
    try:
        with os.fdopen(reading) as made:
            return made.read() if select.select([made], [], [], _WALL_SECONDS)[0] else ""
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored, or another has waited for it
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _bind() -> None:
    """Limits for this process: of processor time, and of memory where the system tells how much it has."""
    resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    own = Path("/proc/self/statm")
    if own.exists():
        taken = int(own.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + TEMPLATE_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
