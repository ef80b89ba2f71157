"""From conversations to examples: the tokens behind the pivot, and which of them are the assistant's.

An assistant's tokens are found by the chat template itself: what a message adds to the text of those before it, behind
the words that invite an answer. Vicuna's conversations are made as by IntactKV's released code (vicuna.py). Plain text
is cut into windows that count whole. Knows tokenizers, no models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from torch import Tensor

from intactkv_eval.chat.bos_text import encoded_with_places
from intactkv_eval.chat.conversations import Conversations
from intactkv_eval.chat.messages import Conversation, is_plain
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.chat.vicuna import is_vicuna, released_tokens
from intactkv_eval.data.hub import digest_of
from intactkv_eval.errors import DataError
from intactkv_eval.pivot.prefix_choice import nll_of

Body = Callable[[Sequence[int]], list[int]]
"""The tokens of a row -> those behind the pivot."""


@dataclass(frozen=True, eq=False)
class Example:
    """body: tokens [T] (int64) behind the pivot. counted: [T] (bool), those whose outputs the loss looks at."""

    body: Tensor
    counted: Tensor


def examples_of(
    conversations: Conversations,
    tokenizer: Any,
    body: Body,
    most_tokens: int = 1024,
    least_counted: int = 50,
    count: int | None = None,
    chat: ChatSettings | None = None,
) -> list[Example]:
    """Examples of at most `most_tokens`, cut at the end, of more than `least_counted` assistant tokens; others go.

    count: the first so many of them. chat: how the chat template is rendered. Raises DataError where
    none, or fewer, are left, or where the chat template cannot tell whose a token is.
    """
    kept: list[Example] = []
    looked = 0
    for one in conversations.texts:
        if is_plain(one):
            found = _windows(one[0].content, tokenizer, most_tokens)
        else:
            tokens, mine = _marked(one, tokenizer, chat)
            found = [_example(tokens[:most_tokens], mine[:most_tokens], body)]
        looked += len(found)
        kept += [example for example in found if int(example.counted.sum()) > least_counted]
        if count is not None and len(kept) >= count:
            return kept[:count]
    if not kept or count is not None:
        raise DataError(
            f"{conversations.source}: {len(kept)} of {looked} conversations have more than {least_counted} assistant "
            f"tokens among the first {most_tokens}, {count or 2} are needed; questions without answers need "
            "--generate-answers"
        )
    return kept


def digest_of_examples(examples: Sequence[Example]) -> str:
    """SHA-256 over tokens and what counts of them: what a chat template, too, has a part in."""
    return digest_of(part for example in examples for part in (example.body.numpy(), example.counted.numpy()))


def counted_nll(logits: Tensor, example: Example) -> Tensor:
    """The nll [N] of the counted tokens, from logits [T, V] behind the body's tokens; none of the first one's."""
    places = example.counted.nonzero()[:, 0]
    places = places[places > 0].to(logits.device)
    return nll_of(logits[places - 1], example.body[places.to(example.body.device)])


def _windows(text: str, tokenizer: Any, size: int) -> list[Example]:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    pieces = [torch.tensor(ids[start : start + size], dtype=torch.long) for start in range(0, len(ids), size)]
    return [Example(piece, torch.ones(len(piece), dtype=torch.bool)) for piece in pieces]


def _example(tokens: list[int], mine: list[bool], body: Body) -> Example:
    behind = body(tokens)
    counted = mine[len(mine) - len(behind) :]  # the pivot takes tokens from the front alone
    return Example(torch.tensor(behind, dtype=torch.long), torch.tensor(counted, dtype=torch.bool))


def _marked(conversation: Conversation, tokenizer: Any, chat: ChatSettings | None) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which are the assistant's."""
    if is_vicuna(tokenizer):
        return released_tokens(conversation, tokenizer, lambda asked: rendered(asked, tokenizer, True, chat))
    text = rendered(conversation, tokenizer, chat=chat)
    spans = []
    for place, message in enumerate(conversation):
        if message.role == "assistant":
            before = rendered(conversation[:place], tokenizer, invite=True, chat=chat)
            after = rendered(conversation[: place + 1], tokenizer, chat=chat)
            if not after.startswith(before) or not text.startswith(after):
                raise DataError(
                    "the chat template writes a conversation's beginning otherwise when more follows, so an answer's "
                    "tokens cannot be told; use conversations of one turn, or another chat_template"
                )
            spans.append((len(before), len(after)))
    if not tokenizer.is_fast:
        raise DataError("this tokenizer does not tell where its tokens lie in the text; use its fast version")
    tokens, places = encoded_with_places(tokenizer, text)
    return tokens, [any(start <= place < end for start, end in spans) for place in places]


def rendered(conversation: Conversation, tokenizer: Any, invite: bool = False, chat: ChatSettings | None = None) -> str:
    """The text of a conversation; `invite`: with the words behind which an assistant answers.

    chat: how the chat template is rendered.
    Raises DataError where the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("conversations need a chat template, which this tokenizer lacks: chat_template=vicuna_v1.1")
    messages = [message._asdict() for message in conversation]
    try:
        return (chat or ChatSettings()).render(tokenizer, messages, invite)
    except jinja2.exceptions.TemplateError as error:
        raise DataError(f"the chat template refuses a conversation: {error}") from None
