"""The judge's run: what has no verdict yet is asked, several at a time; every reply is kept, a missing one is counted.

Stops early, with nothing lost, where the cap is reached or the server refuses the key.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.client import Judge, NoReply, Settings
from intactkv_eval.judge.cost import Purse, estimated
from intactkv_eval.judge.journal import Journal, Line
from intactkv_eval.judge.matches import Match
from intactkv_eval.judge.verdict import verdict_of
from intactkv_eval.messages import struck

_HOPELESS = 10  # requests, before any reply has come


@dataclass
class Outcome:
    """Of a run: how many matches have a verdict, replies that hold none, what went wrong how often."""

    rated: int = 0
    unrated: int = 0
    unasked: int = 0
    failed: Counter[str] = field(default_factory=Counter)


def missing(journal: Journal, settings: Settings, matches: Sequence[Match]) -> list[Match]:
    """The matches that have no verdict in the journal, each request once."""
    keys = {key_of(settings, match): match for match in matches}
    return [match for key, match in keys.items() if not _has_verdict(journal, key)]


def judge_all(
    journal: Journal,
    judge: Judge,
    matches: Sequence[Match],
    purse: Purse,
    concurrency: int,
    attempts: int,
    done: Callable[[], object],
) -> Outcome:
    """Ask for all that is missing, at most `attempts` times each in this run. Raises ConfigError where refused."""
    outcome = Outcome()
    asked = missing(journal, judge.settings, matches)
    before = journal.added
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(_judged, journal, judge, match, purse, attempts) for match in asked]
        try:
            for future in as_completed(futures):
                problem = future.result()
                if problem:
                    outcome.failed[problem] += 1
                if journal.added == before and outcome.failed.total() >= max(_HOPELESS, 2 * concurrency):
                    raise ConfigError(f"the judge gives no reply, the last error was: {problem}")
                done()
        finally:  # whatever ended the loop: nothing more may be asked and paid
            pool.shutdown(wait=False, cancel_futures=True)
    for key in {key_of(judge.settings, match) for match in matches}:
        line = journal.lines.get(key)
        if line is None:
            outcome.unasked += 1
        elif line.verdict is None:
            outcome.unrated += 1
        else:
            outcome.rated += 1
    return outcome


def _judged(journal: Journal, judge: Judge, match: Match, purse: Purse, attempts: int) -> str | None:
    """Ask until there is a verdict; what went wrong in the last attempt where there is none."""
    problem = None
    for attempt in range(1, attempts + 1):
        if purse.is_empty:
            return f"the cap of {purse.cap:.2f} USD is reached"
        try:
            reply = judge.ask(match.messages)
        except NoReply as error:
            problem = str(error)
            if error.final:
                break
            purse.pay(estimated(match))  # it was answered, only not in words that can be read
            continue
        purse.pay(reply.tokens or estimated(match))
        verdict = verdict_of(match.kind, reply.text)
        journal.add(
            Line(
                key=key_of(judge.settings, match),
                server=struck(judge.settings.base_url or "") or None,
                judge=judge.settings.model,
                prompt=match.prompt,
                kind=match.kind,
                models=match.models,
                question_id=match.question_id,
                turn=match.turn,
                choice=match.choice,
                user_prompt=match.messages[-1][1],
                reply=reply.text,
                finish=reply.finish,
                tokens=reply.tokens,
                verdict=verdict,
                attempt=attempt,
                tstamp=time.time(),
            )
        )
        if verdict is not None:
            return None
        problem = "a reply without a verdict"
    return problem


def key_of(settings: Settings, match: Match) -> str:
    """What a reply to the match is known by."""
    return match.key(settings.model, settings.base_url, settings.most_tokens)


def _has_verdict(journal: Journal, key: str) -> bool:
    line = journal.lines.get(key)
    return line is not None and line.verdict is not None
