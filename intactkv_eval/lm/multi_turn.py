"""lm_eval's request type `generate_turns`: a conversation whose every open question the model answers in its turn.

    arguments: (first question, {"messages": [{"role", "content"}, ...], "max_gen_toks": N, ...})
    response:  [[answer, prompt, "stop" | "length", tokens], ...], one for each open question

Options are OPTIONS. A sampled answer depends on `seed` alone, so lm_eval's --use_cache may keep it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

from intactkv_eval.chat.messages import Conversation, Message, filled, open_question, waits
from intactkv_eval.compat.lm_eval_api import Instance, hash_args
from intactkv_eval.errors import ConfigError, unknown_key
from intactkv_eval.inference.batch_size import kv_bytes_per_token
from intactkv_eval.inference.generation.multi_turn import ChatTurn, TurnPrompt, converse
from intactkv_eval.inference.generation.plan import eos_ids
from intactkv_eval.inference.generation.sampling import SamplingParams
from intactkv_eval.inference.generation.turn_cache import BUDGET
from intactkv_eval.lm.generation import PivotedGeneration
from intactkv_eval.training.examples import rendered

REQUEST = "generate_turns"
OPTIONS = ("messages", "max_gen_toks", "temperature", "top_k", "top_p", "seed", "until")
Number = TypeVar("Number", int, float)
_TOP_K = 50  # of transformers' own sampling, where a model names none


def number(name: str, value: Any, kind: Callable[[Any], Number], most: float = float("inf")) -> Number:
    """The value of an option as a number from 0. Raises ConfigError where it is none, or above `most`."""
    try:
        found = kind(value)
    except (TypeError, ValueError):
        found = None
    if found is None or not 0 <= found <= most:
        raise ConfigError(f"{name}={value!r}: expected a number from 0" + (f" to {most:g}" if most < 9 else ""))
    return found


@dataclass(frozen=True)
class MultiTurnRequest:
    """A conversation with open questions, and how they are answered."""

    messages: Conversation
    most: int
    temperature: float
    top_k: int
    top_p: float
    seed: str
    until: tuple[str, ...]


def _behind_last(token: int, tokens: Sequence[int]) -> list[int]:
    """What stands behind the last `token`; everything where there is none."""
    places = [place for place, other in enumerate(tokens) if other == token]
    return list(tokens[places[-1] + 1 :] if places else tokens)


class MultiTurnGeneration(PivotedGeneration):
    """Answers conversations behind the pivot; the codec of its own requests."""

    @property
    def eos(self) -> tuple[int, ...]:
        """What ends an answer: the tokenizer's token and the model's own."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*eos_ids(self.model), *([] if own is None else [own])}))

    @property
    def pad(self) -> int:
        """What fills up rows that have ended: any word of the model, since answers are cut at their end."""
        return self.filling_token or 0

    def generate_turns(self, requests: list[Instance], disable_tqdm: bool = False) -> list[list[list[Any]]]:
        """All answers of each conversation, with their prompts. Raises ConfigError for an unknown option."""
        known: Any = getattr(self.cache_hook, "dbdict", None)
        found: list[list[list[Any]]] = [[] for _ in requests]
        places = []
        for place, request in enumerate(requests):
            key = hash_args(REQUEST, self._kept_under(request))
            if known is not None and key in known:
                found[place] = known[key]
            else:
                places.append(place)
        talks = [self._talk(requests[place].args[1]) for place in places]
        with tqdm(total=len(talks), desc="Running generate_turns requests", disable=disable_tqdm or self.rank) as bar:

            def done(index: int, turns: list[ChatTurn]) -> None:
                found[places[index]] = [list(turn) for turn in turns]
                self.cache_hook.add_partial(REQUEST, self._kept_under(requests[places[index]]), found[places[index]])
                bar.update(1)

            self._converse(talks, done)
        return found

    def _kept_under(self, request: Instance) -> tuple[Any, ...]:
        """What answers are kept under: prompts are written here, so their date is no part of the request."""
        return (*request.args, self.chat.date) if self.chat.date is not None else tuple(request.args)

    def _converse(self, talks: Sequence[MultiTurnRequest], done: Any) -> None:
        longest = min(max(map(self._tokens, talks), default=1), int(self.max_length))
        rows = min(self._rows_for(None)(longest), max(len(talks), 1))
        if self._starts is None:
            converse(self.pivoted_model, talks, self, rows, None, done)
            return
        whole = rows * longest * kv_bytes_per_token(self.model)
        with self._starts.turns_kept(max(BUDGET, whole), longest):
            converse(self.pivoted_model, talks, self, rows, self._starts, done)

    def _tokens(self, talk: MultiTurnRequest) -> int:
        """Of the whole conversation, where each answer is as long as it may be."""
        said, answers = talk.messages, 0
        while waits(said):
            said, answers = filled(said, [""]), answers + 1
        return len(self.tok_encode(rendered(said, self.tokenizer, chat=self.chat))) + answers * talk.most

    def _rows_for(self, override: int | None) -> Any:
        raise NotImplementedError

    def _talk(self, options: Mapping[str, Any]) -> MultiTurnRequest:
        for key in options:
            if key not in OPTIONS:
                raise unknown_key(key, OPTIONS)
        own = self.model.generation_config
        top_k, top_p = (options.get("top_k", own.top_k), options.get("top_p", own.top_p))
        most = number("max_gen_toks", options["max_gen_toks"], int)
        if not 0 < most < self.max_length:
            raise ConfigError(f"max_gen_toks={most}: {self.max_length} tokens fit behind the pivot, prompt included")
        until = options.get("until") or own.stop_strings or ()
        return MultiTurnRequest(
            messages=tuple(Message(one["role"], one["content"]) for one in options["messages"]),
            most=most,
            temperature=number("temperature", options.get("temperature") or 0.0, float),
            top_k=_TOP_K if top_k is None else number("top_k", top_k, int),
            top_p=1.0 if top_p is None else number("top_p", top_p, float, most=1.0),
            seed=str(options.get("seed", "")),
            until=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        )

    def ask(self, talk: MultiTurnRequest, answers: Sequence[str]) -> TurnPrompt | None:
        """The conversation up to its first open question, answers filled in; the pivot's tokens taken off."""
        said = filled(talk.messages, answers)
        end = open_question(said)
        if end is None:
            return None
        prompt = rendered(said[:end], self.tokenizer, invite=True, chat=self.chat)
        tokens = self.tok_encode(prompt)
        self.check_head(prompt, tokens)
        body = self.framing.body(tokens)
        room = int(self.max_length)
        if len(body) >= room:
            self.framing.counts["truncated"] += 1
            body = body[talk.most - room :]
        most = min(talk.most, room - len(body))
        if most < talk.most:
            self.framing.counts["answers_with_less_room"] += 1
        draw = SamplingParams(talk.temperature, talk.top_k, talk.top_p, f"{talk.seed}/{len(answers)}")
        return TurnPrompt(prompt, body, most, draw)

    def answer(self, talk: MultiTurnRequest, tokens: Sequence[int]) -> tuple[str, bool]:
        """The text behind its thoughts, without special tokens and the space around it, cut at the first stop string.

        A stop string ends an answer among the thoughts too, as in lm_eval's `hf`.
        """
        text: str = self.tok_decode(list(tokens))
        stopped = any(stop in text for stop in talk.until)
        if isinstance(self.think_end_token, int):
            text = self.tok_decode(_behind_last(self.think_end_token, tokens))
        elif self.think_end_token:
            text = text.split(self.think_end_token)[-1]
        ends = [text.find(stop) for stop in talk.until if stop in text]
        return (text[: min(ends)] if ends else text).strip(), stopped
