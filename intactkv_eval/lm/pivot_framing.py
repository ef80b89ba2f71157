"""Framing: what of a request's tokens stands behind the pivot.

A request that begins with the pivot's tokens is stripped of them; one that begins with a lone BOS (or is only lm_eval's
stand-in for an empty context) loses that, since the pivot takes its place; any other gets the pivot put in front as it
is. A BOS that opens every message of a chat (SmolLM2's is ChatML's <|im_start|>) is not lone: requests need their own.
Which happened, and how often, is counted for the results. Knows token ids only.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.scoring.request_table import Request


@dataclass
class PivotFraming:
    """token_ids: the pivot, possibly empty. prefix: lm_eval's token for an empty context. room: tokens behind it.

    opens_messages: whether `prefix` stands in front of every message of chat prompts.
    """

    token_ids: tuple[int, ...]
    prefix: int | None
    room: int
    opens_messages: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def body(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that stand behind the pivot."""
        length = len(self.token_ids)
        if length and tuple(tokens[:length]) == self.token_ids:
            self.counts["stripped"] += 1
            return list(tokens[length:])
        if length and self._has_lone_bos(tokens):
            self.counts["bos_replaced"] += 1
            return list(tokens[1:])
        self.counts["prepended" if length else "unchanged"] += 1
        return list(tokens)

    def _has_lone_bos(self, tokens: Sequence[int]) -> bool:
        if not tokens or tokens[0] != self.prefix:
            return False
        if len(tokens) == 1:
            return True
        return tokens[0] == self.token_ids[0] and not (self.opens_messages and tokens[0] in tokens[1:])

    def _replaced(self, context: Sequence[int]) -> list[int]:
        self.counts["first_replaced" if self.token_ids else "unchanged"] += 1
        return list(context[1:]) if self.token_ids else list(context)

    def request(self, context: Sequence[int], continuation: Sequence[int], whole: bool = False) -> Request:
        """A request behind the pivot, its context cut from the left where it is too long; the pivot is never cut.

        `whole`: tokens that a task has defined exactly, the first of which the pivot replaces, whatever it is.
        Raises ConfigError where the continuation is empty or alone does not fit, or a `whole` request does not.
        """
        if not continuation:
            raise ConfigError("an empty continuation has no log-likelihood: the task asks to score an empty text")
        body = self._replaced(context) if whole else self.body(context)
        most = self.room + 1 - len(continuation)
        if whole and len(body) > most:
            fits = self.room + (2 if self.token_ids else 1)
            raise ConfigError(
                f"a window of {len(context) + len(continuation)} tokens does not fit behind a pivot of "
                f"{len(self.token_ids)}: choose a smaller one with --metadata ppl_window={fits}"
            )
        if most < (0 if self.token_ids else 1):
            raise ConfigError(
                f"a continuation of {len(continuation)} tokens does not fit behind a pivot of {len(self.token_ids)}: "
                f"{self.room} tokens are left of the model's length; score shorter texts or raise max_length"
            )
        if len(body) > most:
            self.counts["truncated"] += 1
            body = body[len(body) - most :]
        return Request(body, list(continuation))
