"""Talks: conversations whose later questions wait for the model's own answers, many at a time.

    [asked, asked, ...] -> batch of rows under way -> CHUNK tokens each -> those that ended are replaced -> ...

A row whose answer ended goes on with its next question at once, behind the KV that is held; one whose last answer ended
makes room for the next talk. So no row waits for the longest of its batch. What a row says does not depend on the rows
beside it, but for the rounding of other batch shapes. Knows tokens; texts are its codec's.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.generation.sampling import RowSampler, SamplingParams
from intactkv_eval.inference.generation.settings import served
from intactkv_eval.inference.pivoted_model import PivotedModel

CHUNK = 64
_ONE_BEAM: dict[str, Any] = {"num_beams": 1, "stop_strings": None}  # over the checkpoint's: the codec has stop strings
Talk = TypeVar("Talk")
Talk_contra = TypeVar("Talk_contra", contravariant=True)


class ChatTurn(NamedTuple):
    """One answer. prompt: the text that it goes on from. ended: `stop`, or `length` where it was cut. tokens: made."""

    answer: str
    prompt: str
    ended: str
    tokens: int


class TurnPrompt(NamedTuple):
    """prompt: a text, and `body` its tokens behind the pivot. most: new tokens. draw: how they are sampled."""

    prompt: str
    body: list[int]
    most: int
    draw: SamplingParams


class Codec(Protocol[Talk_contra]):
    """What makes tokens of a talk, and texts of tokens."""

    eos: tuple[int, ...]
    pad: int

    def ask(self, talk: Talk_contra, answers: Sequence[str]) -> TurnPrompt | None:
        """What comes next behind the answers so far; None where nothing is left to answer."""
        ...

    def answer(self, talk: Talk_contra, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text of an answer's tokens, and whether a stop string has ended it."""
        ...


@dataclass
class _Row(Generic[Talk]):
    place: int
    talk: Talk
    asked: TurnPrompt | None = None
    made: list[int] = field(default_factory=list)
    turns: list[ChatTurn] = field(default_factory=list)


def converse(
    pivoted: PivotedModel,
    talks: Sequence[Talk],
    codec: Codec[Talk],
    rows: int,
    starts: PrefixCache | None,
    done: Callable[[int, list[ChatTurn]], None],
) -> None:
    """Answer all conversations, `rows` at a time; `done` gets each one's number and turns as it ends."""
    waiting = deque(_Row(place, talk) for place, talk in enumerate(talks))
    under_way: list[_Row[Talk]] = []
    # With dynamic NTK each token keeps the frequencies of its time, so a text is not taken up again.
    kept = starts is not None and starts.turns is not None and not pivoted.rope.grows
    chunk = CHUNK if kept and not served(pivoted.model.generation_config, _ONE_BEAM).in_one_go else None
    while waiting or under_way:
        while waiting and len(under_way) < rows:
            under_way.append(waiting.popleft())
        for row in [row for row in under_way if row.asked is None]:
            row.asked = codec.ask(row.talk, [turn.answer for turn in row.turns])
            if row.asked is None:
                under_way.remove(row)
                done(row.place, row.turns)
        fresh = [row for row in under_way if not row.made]
        if chunk and fresh and len(fresh) < len(under_way):
            _go_on(pivoted, fresh, codec, 1, starts)  # by themselves: their prompts would be everybody's padding
        elif under_way:
            _go_on(pivoted, under_way, codec, chunk, starts)


def _go_on(
    pivoted: PivotedModel,
    rows: list[_Row[Talk]],
    codec: Codec[Talk],
    chunk: int | None,
    starts: PrefixCache | None,
) -> None:
    """At most `chunk` tokens more for each of the rows, which take down what has ended."""
    asked = [row.asked for row in rows if row.asked is not None]
    bodies = [one.body + row.made for one, row in zip(asked, rows, strict=True)]
    longest = max(map(len, bodies))
    # Padding is a token of the row itself: a penalty on tokens that were seen then finds the same ones in any batch.
    ids = torch.tensor([body[:1] * (longest - len(body)) + body for body in bodies])
    mask = torch.tensor([[0] * (longest - len(body)) + [1] * len(body) for body in bodies])
    left = max(one.most - len(row.made) for one, row in zip(asked, rows, strict=True))
    out = generate(
        pivoted,
        ids.to(pivoted.device),
        mask.to(pivoted.device),
        min(left, chunk or left),
        starts=starts,
        sampler=RowSampler([one.draw for one in asked]),
        eos_token_id=list(codec.eos),
        pad_token_id=codec.pad,
        do_sample=False,
        **_ONE_BEAM,
    )
    for row, made in zip(rows, out[:, longest:].tolist(), strict=True):
        _take(row, made, codec)


def _take(row: _Row[Talk], made: list[int], codec: Codec[Talk]) -> None:
    """Add what was made; where that ends the answer, keep it as a turn and ask anew."""
    assert row.asked is not None
    end = next((place for place, token in enumerate(made) if token in codec.eos), None)
    row.made += made if end is None else made[:end]
    kept = row.made[: row.asked.most]
    text, stopped = codec.answer(row.talk, kept)
    if stopped:  # the token that completed the stop string is the last that counts
        kept = next(kept[:n] for n in range(1, len(kept) + 1) if codec.answer(row.talk, kept[:n])[1])
        text, _ = codec.answer(row.talk, kept)
    ended = stopped or (end is not None and len(row.made) < row.asked.most)
    if ended or len(kept) == row.asked.most:
        row.turns.append(ChatTurn(text, row.asked.prompt, "stop" if ended else "length", len(kept)))
        row.made, row.asked = [], None
