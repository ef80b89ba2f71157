"""The date of a run's chat prompts: one for all of them, chosen, of the pivot's file, of the run, or today.

A head that was captured on another day, or with other settings, is told from the one that this run renders.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch.distributed

from intactkv_eval.cell.spec import PivotSpec
from intactkv_eval.chat.bos_text import bos_changes_tokens, encoded_as_text
from intactkv_eval.chat.sandbox import prompts_of_chats
from intactkv_eval.chat.templates import ChatSettings, may_be_random, may_read_clock, template_hash
from intactkv_eval.compat.transformers_api import template_now
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.pivot.identity import ChatHead
from intactkv_eval.pivot.kv import head_of_file
from intactkv_eval.pivot.tokens import prompt_head

logger = logging.getLogger(__name__)

_OF_THE_RUN: ContextVar[tuple[datetime, bool] | None] = ContextVar("moment of the run", default=None)
# Each differs from the present in the date, the day of the week and the time of day.
_OTHER_TIMES = (timedelta(days=400, hours=5, minutes=7, seconds=11), timedelta(days=45, hours=3, minutes=21, seconds=4))
_USER, _SYSTEM = {"role": "user", "content": "Hello there"}, {"role": "system", "content": "Be brief."}
_TALKS = ([_USER], [_SYSTEM, _USER], [_USER, {"role": "assistant", "content": "Hi."}, _USER])
_REPEATS = 8  # renderings that a random choice of two leaves equal once in 128 times


@contextmanager
def moment_of_run(date: str | None = None, chosen: bool = True) -> Iterator[str]:
    """Every model that is made inside renders chat prompts of one moment, unless its cell or its pivot names another.

    Args:
        date: In ISO 8601; where it is None, that of an enclosing run, or the present.
        chosen: Whether somebody chose `date`, so that templates which take a date as a variable are given it.
    """
    outer = _OF_THE_RUN.get()
    present = template_now().replace(microsecond=0)
    found = (outer or (present, False)) if date is None else (datetime.fromisoformat(date), chosen)
    token = _OF_THE_RUN.set(found)
    try:
        yield found[0].isoformat()
    finally:
        _OF_THE_RUN.reset(token)


def date_of(spec: PivotSpec) -> str | None:
    """The date that a cell's pivot names, by itself or by its file. Raises PivotError for a file that is no PivotKV."""
    head = head_of_file(Path(spec.source)) if spec.kind == "kv_file" else None
    return spec.chat_date or (head.date if head is not None else None)


def chat_settings(spec: PivotSpec, tokenizer: Any, arguments: Mapping[str, Any]) -> ChatSettings:
    """How all chat prompts of a run are rendered.

    Args:
        spec: The cell's pivot, whose `chat_date` and file may name the date.
        tokenizer: Whose template it is.
        arguments: What the template is given besides the messages.

    Returns:
        The settings. Their moment is None where no prompt of the template depends on it.

    Raises:
        ConfigError: `chat_date` is given, and the template writes no date.
        PivotError: The pivot's file is missing or damaged.
    """
    template = getattr(tokenizer, "chat_template", None)
    found = plain = ChatSettings(arguments)
    named, run = date_of(spec), _OF_THE_RUN.get()
    chosen = named is not None or (run is not None and run[1])
    if may_read_clock(template, chosen):
        moment = datetime.fromisoformat(named) if named is not None else run[0] if run is not None else _present()
        found = _dated(tokenizer, plain, moment, chosen)
    if spec.chat_date is not None and found.moment is None:
        raise ConfigError(
            f"chat_date={spec.chat_date}: does nothing, the chat prompts of this tokenizer hold no date that it could "
            "set; drop it, or give a variable of the template with chat_template_args"
        )
    if named is not None and found.date not in {spec.chat_date, template_now().date().isoformat(), None}:
        text = "chat prompts are rendered as of %s, the date of %s; give its baseline chat_date=%s"
        logger.warning(text, found.date, spec.source, found.date)
    return found


def _present() -> datetime:
    """The present: of several processes that of the first, since midnight may lie between them."""
    found = [template_now().replace(microsecond=0)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found, 0)
    return found[0]


def _dated(tokenizer: Any, plain: ChatSettings, moment: datetime, named: bool) -> ChatSettings:
    """`plain` at `moment`, at midnight where prompts depend on its date alone, or as it is where on nothing of it.

    Where no conversation can be rendered it is not known what they depend on, and the moment is kept.
    """
    midnight = moment.replace(hour=0, minute=0, second=0)
    times = [moment, midnight, *(moment + other for other in _OTHER_TIMES)]
    settings = [plain.at(time, tokenizer.chat_template, named) for time in times]
    prompts = [found for talk in _TALKS if (found := _prompts(tokenizer, talk, settings))]
    if prompts and all(len(set(found)) == 1 for found in prompts):
        return plain
    return settings[1] if prompts and all(found[0] == found[1] for found in prompts) else settings[0]


def _prompts(tokenizer: Any, talk: list[dict[str, str]], settings: list[ChatSettings]) -> list[str]:
    """The prompt of a conversation with each of the settings; none where the template refuses it."""
    try:
        return prompts_of_chats(tokenizer, [talk], settings)
    except PivotError:
        return []


def is_random(tokenizer: Any, chat: ChatSettings) -> bool:
    """Whether the chat template writes one conversation in several ways, though its date is fixed."""
    if not may_be_random(getattr(tokenizer, "chat_template", None)):
        return False
    return any(len(set(_prompts(tokenizer, talk, [chat] * _REPEATS))) > 1 for talk in _TALKS)


def head_record(tokenizer: Any, chat: ChatSettings) -> ChatHead:
    """What a PivotKV that is the head of chat prompts says of how these were rendered."""
    arguments = {key: repr(value) for key, value in sorted(chat.arguments.items())}
    return ChatHead(date=chat.date, template=template_hash(tokenizer.chat_template), arguments=arguments)


def check_captured_head(
    spec: PivotSpec, tokens: tuple[int, ...], head: ChatHead | None, tokenizer: Any, chat: ChatSettings
) -> bool:
    """Whether the pivot is the head of the chat prompts that this run renders.

    Args:
        spec: The cell's pivot.
        tokens: Its tokens.
        head: What its file says of the chat prompts whose head it is; None where it says nothing.
        tokenizer: Whose template the run renders.
        chat: How it does so.

    Raises:
        PivotError: It is the head of chat prompts that are rendered otherwise: on another date, with other settings,
            or with another template.
    """
    if len(tokens) < 2 or spec.source == "prompt":
        return spec.source == "prompt"
    try:
        rendered = prompt_head(tokenizer, chat)
    except PivotError:
        return False  # no chat prompt is made with this tokenizer
    if rendered[: len(tokens)] == tokens:
        return rendered == tokens or head is not None
    if bos_changes_tokens(tokenizer) and prompt_head(tokenizer, chat, encoded_as_text) == tokens:
        words = [tokenizer.convert_ids_to_tokens(list(ids[:3])) for ids in (tokens, rendered)]
        raise PivotError(
            f"pivot={spec.source}: its tokens are the head of a chat prompt whose BOS was tokenized as text, so they "
            f"begin with {words[0]}; the tokenizer adds BOS itself now, and prompts begin with {words[1]}, as "
            "FastChat's do. Use pivot=prompt, or capture it anew: intactkv capture MODEL --pivot prompt"
        )
    if head is None and not _is_of_another_date(tokens, rendered, tokenizer, chat):
        return False
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (tokens, rendered)]
    raise PivotError(
        f"pivot={spec.source}: its tokens are the head of a chat prompt, {texts[0]!r}, and the chat prompts of this "
        f"run begin with {texts[1]!r}: behind the pivot each would have a second head. {_fix(head, tokenizer, chat)}"
    )


def _is_of_another_date(tokens: tuple[int, ...], rendered: tuple[int, ...], tokenizer: Any, chat: ChatSettings) -> bool:
    """Whether `tokens` begin and end as the head that is rendered now does in front of and behind its date."""
    if chat.moment is None:
        return False
    other = prompt_head(tokenizer, ChatSettings(chat.arguments, chat.moment + _OTHER_TIMES[0]))
    front = _common(rendered, other)
    back = _common(rendered[front:][::-1], other[front:][::-1])
    begins = front > 1 and tokens[:front] == rendered[:front]
    return begins and tokens[len(tokens) - back :] == rendered[len(rendered) - back :]


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many tokens two rows begin alike with."""
    shorter = min(len(one), len(other))
    return next((place for place in range(shorter) if one[place] != other[place]), shorter)


def _fix(head: ChatHead | None, tokenizer: Any, chat: ChatSettings) -> str:
    anew = "or capture it anew: intactkv capture MODEL --pivot prompt"
    if head is None:
        return f"Render the date of that head with chat_date=YYYY-MM-DD, {anew}"
    now = head_record(tokenizer, chat)
    if head.template != now.template:
        return f"It was captured with another chat template: name that one with chat_template=FILE.jinja, {anew}"
    if head.date != now.date:
        own = "no date of its own" if head.date is None else head.date
        return f"It was captured with prompts of {own}, and this run renders {now.date}: drop chat_date, {anew}"
    keys = [
        key for key in sorted({*head.arguments, *now.arguments}) if head.arguments.get(key) != now.arguments.get(key)
    ]
    said = ", ".join(f"{key}={head.arguments.get(key, '(not given)')}" for key in keys)
    return f"It was captured with {said}: give the same here, {anew}" if said else f"Use pivot=prompt, {anew}"
