"""What a judgement costs: an estimate beforehand, a price for each request before it leaves, and a cap over all calls.

    estimate   four letters to a token, 300 tokens a reply: what a run is likely to cost, said before it begins
    price      no token has less than a byte, and a reply ends at --most-tokens: what one request can cost at most
    cap        spent + prices of the requests in flight + the next one's price <= cap, else the next one waits or stays

What was spent is in the journal, reply by reply, so that the cap holds over re-runs. A request is settled with the
tokens that the server counts; with its price where the server tells none, or may have worked and was not heard.
Money only where prices are given, in USD a million tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.matches import Match

_LETTERS = 4
_REPLY = 300  # tokens
_AROUND = 16  # tokens of a message's role and marks, at most
Tokens = tuple[int, int]


@dataclass(frozen=True)
class Prices:
    """USD a million tokens, of requests and of replies."""

    asked: float = 0.0
    replied: float = 0.0

    def of(self, tokens: Tokens) -> float:
        """USD."""
        return (tokens[0] * self.asked + tokens[1] * self.replied) / 1e6

    @property
    def are_given(self) -> bool:
        """Whether anything costs money."""
        return bool(self.asked or self.replied)


def estimated(match: Match) -> Tokens:
    """The likely tokens of a request and of its reply."""
    return sum(len(text) for _, text in match.messages) // _LETTERS + 1, _REPLY


def most(match: Match, max_tokens: int) -> Tokens:
    """The most tokens that a request and its reply can have."""
    return sum(len(text.encode()) + _AROUND for _, text in match.messages) + _AROUND, max_tokens


class BudgetTracker:
    """What was spent, what is in flight, and whether one more request may leave.

    spent: USD, by earlier calls too. cap: USD, None for none. Used by several threads.
    Raises ConfigError for a cap without prices.
    """

    def __init__(self, prices: Prices, cap: float | None, spent: float = 0.0) -> None:
        if cap is not None and not prices.are_given:
            raise ConfigError("--cap: needs --price-in and --price-out, in USD a million tokens")
        self.prices, self.cap, self.before = prices, cap, spent
        self.spent = spent
        self.tokens: Tokens = (0, 0)
        self.is_reached = False
        self._in_flight: list[float] = []
        self._changed = threading.Condition()

    def reserve(self, tokens: Tokens) -> bool:
        """Whether a request of at most so many tokens may leave. Waits while those in flight may leave room for it."""
        price = self.prices.of(tokens)
        with self._changed:
            while not self._fits(price) and self._in_flight:
                self._changed.wait()
            if not self._fits(price):
                self.is_reached = True
                return False
            self._in_flight.append(price)
            return True

    def settle(self, reserved: Tokens, used: Tokens) -> float:
        """A request that had left is over and took `used` tokens; what they cost, in USD."""
        cost = self.prices.of(used)
        with self._changed:
            self._in_flight.remove(self.prices.of(reserved))
            self.spent += cost
            self.tokens = (self.tokens[0] + used[0], self.tokens[1] + used[1])
            self._changed.notify_all()
        return cost

    def _fits(self, price: float) -> bool:
        return self.cap is None or self.spent + sum(self._in_flight) + price <= self.cap

    def estimate(self, matches: Sequence[Match], max_tokens: int) -> str:
        """A line for the user. Raises ConfigError where the estimate is above a cap of which nothing is spent yet."""
        asked, replied = _sum([estimated(match) for match in matches])
        money = self.prices.of((asked, replied))
        line = f"{len(matches)} requests, about {asked:,} tokens in and {replied:,} out"
        if self.prices.are_given:
            highest = self.prices.of(_sum([most(match, max_tokens) for match in matches]))
            line += f", about {money:.2f} USD (at most {highest:.2f}, were each asked once)"
        if self.before:
            line += f"; {self.before:.2f} USD were spent before"
        if self.cap is not None and money > self.cap and not self.before:
            raise ConfigError(f"{line}: more than the cap of {self.cap:.2f} USD; raise --cap, or judge fewer answers")
        return line


def _sum(tokens: Sequence[Tokens]) -> Tokens:
    return sum(one[0] for one in tokens), sum(one[1] for one in tokens)
