"""The judge's run: what has no verdict yet is asked, several at a time; every reply is kept, a missing one is counted.

Stops early, with nothing lost, where the cap is reached or the server refuses the key.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.client import Failure, Judge, JudgeServer, NoReply
from intactkv_eval.judge.cost import BudgetTracker, Tokens, most
from intactkv_eval.judge.journal import Journal, Line
from intactkv_eval.judge.matches import Match, MatchKey
from intactkv_eval.judge.verdict import verdict_of
from intactkv_eval.judge.wire import Reply
from intactkv_eval.sanitize import struck

_HOPELESS = 10  # requests, before any reply has come
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds between two tries of a request, doubled from the first on


@dataclass
class Outcome:
    """Of a run: how many matches have a verdict, a reply that holds none, no reply; what went wrong how often."""

    rated: int = 0
    unrated: int = 0
    unasked: int = 0
    failed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Worker:
    """What one request needs: whom to ask, where to keep the reply, what may be spent.

    attempts: of a request whose reply has no verdict.
    """

    journal: Journal
    judge: Judge
    budget: BudgetTracker
    attempts: int

    def problem_of(self, match: Match) -> str | None:
        """Ask until there is a verdict; what went wrong in the last attempt where there is none."""
        problem = None
        for attempt in range(1, self.attempts + 1):
            try:
                reply, cost = self._reply(match, attempt)
            except NoReply as error:
                problem = str(error)
                if error.kind is not Failure.UNREADABLE:
                    break
                continue
            verdict = verdict_of(match.kind, reply.text)
            self._keep(match, attempt, reply, cost, verdict)
            if verdict is not None:
                return None
            problem = "a reply without a verdict"
        return problem

    def _reply(self, match: Match, attempt: int) -> tuple[Reply, float]:
        """One reply and what it costs; a failure that may pass is tried again. Raises NoReply."""
        price = most(match, self.judge.settings.max_tokens)
        tries = 0
        while True:
            if not self.budget.reserve(price):
                raise NoReply(f"the cap of {self.budget.cap:.2f} USD is reached", Failure.FINAL)
            used: Tokens = (0, 0)
            try:
                reply = self.judge.send(match.messages)
                used = reply.tokens or price
            except NoReply as error:
                used = price if error.is_billed else (0, 0)
                if error.is_billed and self.budget.prices.are_given:
                    self._keep_error(match, attempt, used, str(error))
                if error.kind is not Failure.PASSING or tries >= self.judge.settings.retries:
                    raise
                delay = error.delay
            else:
                return reply, self.budget.prices.of(used)
            finally:
                self.budget.settle(price, used)
            backoff = min(_FIRST_WAIT * 2**tries, _LONGEST_WAIT) * random.uniform(0.75, 1)
            time.sleep(backoff if delay is None else delay)
            tries += 1

    def _keep(self, match: Match, attempt: int, reply: Reply, cost: float, verdict: float | str | None) -> None:
        line = self._line(match, attempt, cost)
        made = {"reply": reply.text, "finish": reply.finish, "tokens": reply.tokens, "verdict": verdict}
        self.journal.add(line.model_copy(update={**made, "temperature": reply.temperature}))

    def _keep_error(self, match: Match, attempt: int, tokens: Tokens, error: str) -> None:
        line = self._line(match, attempt, self.budget.prices.of(tokens))
        self.journal.add(line.model_copy(update={"tokens": tokens, "error": error}))

    def _line(self, match: Match, attempt: int, cost: float) -> Line:
        """Without a reply yet."""
        settings = self.judge.settings
        return Line(
            key=key_of(settings, match).request,
            server=struck(settings.base_url or "") or None,
            judge=settings.model,
            prompt=match.prompt,
            kind=match.kind,
            models=match.models,
            question_id=match.question_id,
            turn=match.turn,
            choice=match.choice,
            user_prompt=match.messages[-1][1],
            reply="",
            finish=None,
            tokens=None,
            verdict=None,
            attempt=attempt,
            tstamp=time.time(),
            references=match.references,
            cost=cost if self.budget.prices.are_given else None,
        )


def missing(journal: Journal, settings: JudgeServer, matches: Sequence[Match]) -> list[Match]:
    """The matches that have no verdict in the journal, each once."""
    keys = {key_of(settings, match): match for match in matches}
    return [match for key, match in keys.items() if not journal.has_verdict(key)]


def judge_all(worker: Worker, matches: Sequence[Match], concurrency: int, done: Callable[[], object]) -> Outcome:
    """Ask for all that is missing. Raises ConfigError where the server refuses, or never gives a reply."""
    outcome = Outcome()
    journal, settings = worker.journal, worker.judge.settings
    before = journal.added
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(worker.problem_of, match) for match in missing(journal, settings, matches)]
        try:
            for future in as_completed(futures):
                problem = future.result()
                if problem:
                    outcome.failed[problem] += 1
                hopeless = journal.added == before and not worker.budget.is_reached
                if hopeless and outcome.failed.total() >= max(_HOPELESS, 2 * concurrency):
                    raise ConfigError(f"the judge gives no reply, the last error was: {problem}")
                done()
        finally:  # whatever ended the loop: nothing more may be asked and paid
            pool.shutdown(wait=False, cancel_futures=True)
    for key in {key_of(settings, match) for match in matches}:
        line = journal.reply_to(key)
        if line is None:
            outcome.unasked += 1
        elif line.verdict is None:
            outcome.unrated += 1
        else:
            outcome.rated += 1
    return outcome


def key_of(settings: JudgeServer, match: Match) -> MatchKey:
    """What a reply to the match is known by."""
    return match.key(settings.model, settings.base_url, settings.max_tokens)
