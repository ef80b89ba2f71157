"""Prompts of a chat template, which may be a stranger's program: written in a child process (child_process.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import jinja2

from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.errors import PivotError
from intactkv_eval.storage.child_process import result_of_child
from intactkv_eval.storage.limits import TEMPLATE_BYTES, TEMPLATE_CHARACTERS, TEMPLATE_SECONDS


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

    found = result_of_child(lambda: _outcome(write), TEMPLATE_SECONDS, TEMPLATE_BYTES) or {}
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
