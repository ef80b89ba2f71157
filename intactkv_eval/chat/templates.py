"""What a chat template is given besides the messages, and the time that it reads, fixed for a whole run.

A template may write today's date into every prompt (Llama 3.2, Granite, gpt-oss: `strftime_now`), or take it as the
variable `date_string` (Llama 3.1). Prompts, and the head of them that is a pivot, agree only if all of them are
rendered at one moment. Knows tokenizers, no models.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from intactkv_eval.compat.transformers_api import template_clock

_VARIABLE, _FORMAT = "date_string", "%d %b %Y"  # as Llama 3.1's template takes it: 26 Jul 2024
_RANDOM = ("random", "lipsum")  # jinja's filter and its function, without which no template is random


@dataclass(frozen=True)
class ChatSettings:
    """arguments: variables of the template. moment: the time that it reads, None for the clock itself."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    moment: datetime | None = None

    @property
    def date(self) -> str | None:
        """The moment in ISO 8601, without a time of day at midnight; None where the templates' clock is not fixed."""
        if self.moment is None:
            return None
        is_midnight = self.moment.time() == datetime.min.time()
        return self.moment.date().isoformat() if is_midnight else self.moment.isoformat()

    def render(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], invite: bool) -> str:
        """The text of a chat. invite: with the words behind which an assistant answers. Raises as the template does."""
        with template_clock(self.moment):
            text: str = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=invite, **self.arguments
            )
        return text

    def at(self, moment: datetime, template: Any, named: bool = True) -> "ChatSettings":
        """The same at another moment. named: the date was chosen, so that a variable of the template gives it too."""
        if not named or _VARIABLE in self.arguments or _VARIABLE not in _text(template):
            return ChatSettings(self.arguments, moment)
        return ChatSettings({**self.arguments, _VARIABLE: moment.strftime(_FORMAT)}, moment)


def may_read_clock(template: Any, named: bool) -> bool:
    """Whether a date has any way into prompts of `template`: cheap, and never False where it has."""
    text = _text(template)
    return "strftime_now" in text or (named and _VARIABLE in text)


def may_be_random(template: Any) -> bool:
    """Whether prompts of `template` may differ from one rendering to the next."""
    return any(word in _text(template) for word in _RANDOM)


def template_hash(template: Any) -> str | None:
    """SHA-256, 32 hex digits, of a template, or of several by name; None where there is none."""
    if template is None:
        return None
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:32]


def _text(template: Any) -> str:
    return "" if template is None else json.dumps(template)
