"""What a judgement costs: an estimate beforehand, a count as it goes, and a cap.

Tokens are estimated from letters (four to a token) and a reply's usual length; counted are those that the server
tells, or the estimate where it tells none. Money only where prices are given, in USD a million tokens.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.matches import Match

_LETTERS = 4
_REPLY = 300  # tokens


@dataclass(frozen=True)
class Prices:
    """USD a million tokens, of requests and of replies."""

    asked: float = 0.0
    replied: float = 0.0

    def of(self, asked: int, replied: int) -> float:
        """USD."""
        return (asked * self.asked + replied * self.replied) / 1e6


def estimated(match: Match) -> tuple[int, int]:
    """Tokens of the request and of its reply."""
    return sum(len(text) for _, text in match.messages) // _LETTERS + 1, _REPLY


class Purse:
    """What was spent, and whether more may be. cap: USD, None for none. Raises ConfigError for a cap without prices."""

    def __init__(self, prices: Prices, cap: float | None) -> None:
        if cap is not None and not (prices.asked or prices.replied):
            raise ConfigError("--cap: needs --price-in and --price-out, in USD a million tokens")
        self.prices, self.cap = prices, cap
        self.asked = self.replied = 0
        self._turn = threading.Lock()

    @property
    def spent(self) -> float:
        """USD."""
        return self.prices.of(self.asked, self.replied)

    def pay(self, tokens: tuple[int, int]) -> None:
        """Count a request."""
        with self._turn:
            self.asked += tokens[0]
            self.replied += tokens[1]

    @property
    def is_empty(self) -> bool:
        """Whether the cap is reached."""
        return self.cap is not None and self.spent >= self.cap

    def estimate(self, matches: Sequence[Match]) -> str:
        """A line for the user. Raises ConfigError where the estimate is above the cap."""
        tokens = [estimated(match) for match in matches]
        asked, replied = (sum(part) for part in zip(*tokens, strict=True)) if tokens else (0, 0)
        money = self.prices.of(asked, replied)
        said = f"{len(matches)} requests, about {asked:,} tokens in and {replied:,} out"
        if self.prices.asked or self.prices.replied:
            said += f", about {money:.2f} USD"
        if self.cap is not None and money > self.cap:
            raise ConfigError(f"{said}: more than the cap of {self.cap:.2f} USD; raise --cap, or judge fewer answers")
        return said
