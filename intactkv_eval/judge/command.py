"""`intactkv judge`: from answers to scores, with everything kept that was paid for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.client import Judge, Settings
from intactkv_eval.judge.cost import Prices, Purse
from intactkv_eval.judge.entries import Entry, check_models, load_entries
from intactkv_eval.judge.fastchat import Judged, pair_rows, single_rows, write_rows
from intactkv_eval.judge.journal import Journal, opened
from intactkv_eval.judge.matches import Bench, Match, pairwise_matches, single_matches
from intactkv_eval.judge.results import write_results
from intactkv_eval.judge.run import Outcome, judge_all, key_of, missing
from intactkv_eval.judge.scores import score_figures, seed_rows, table, win_figures
from intactkv_eval.mt_bench.answers import read_answers
from intactkv_eval.mt_bench.questions import NEEDS_REFERENCE, load_prompts, load_questions
from intactkv_eval.mt_bench.sources import REFERENCES, bench_file


@dataclass(frozen=True)
class Asked:
    """bench and questions: of the answers. baseline: judge pairs against it. references: whose answers stand beside.

    attempts: of a request whose reply has no verdict, in one run. dry: say what it would cost, and stop.
    """

    bench: str = "mt_bench"
    questions: Path | None = None
    baseline: Path | None = None
    references: str = "gpt-4"
    concurrency: int = 4
    attempts: int = 3
    prices: Prices = field(default_factory=Prices)
    cap: float | None = None
    dry: bool = False


def judge_command(
    sources: Sequence[Path], settings: Settings, asked: Asked, out: Path, say: Callable[[str], None]
) -> str:
    """Judge what has no verdict yet; the table of scores, or of wins where there is a baseline.

    Raises ConfigError or DataError for bad input, and where the judge refuses or never answers; what came is kept.
    """
    purse = Purse(asked.prices, asked.cap)
    entries = load_entries(sources, asked.bench)
    bench = _bench(asked, entries)
    matches = _matches(bench, entries, asked)
    with opened(out) as journal:
        every = [match for part in matches.values() for match in part]
        left = missing(journal, settings, every)
        say(f"{len(every)} to judge, {len(every) - len(left)} have their verdict; {purse.estimate(left)}")
        if asked.dry:
            return "nothing was asked (--dry-run)"
        judge = Judge(settings)
        with tqdm(total=len(left), desc=f"Judging ({settings.model})") as bar:
            outcome = judge_all(journal, judge, every, purse, asked.concurrency, asked.attempts, bar.update)
        _tell(outcome, purse, say)
        return _written(journal, settings, entries, matches, asked, out)


def _bench(asked: Asked, entries: Sequence[Entry]) -> Bench:
    found = load_questions(asked.bench, asked.questions)
    other = next((entry.name for entry in entries if entry.questions not in {None, found.digest}), None)
    if other is not None:
        raise DataError(
            f"{other}: answers to other questions than these; name the folder that it was run with (--questions)"
        )
    questions = {question.question_id: question for question in found.questions}
    answered = {place for entry in entries for place in entry.answers if place in questions}
    needed = any(questions[place].category in NEEDS_REFERENCE for place in answered)
    name = f"{REFERENCES}/{asked.references}.jsonl"
    references = read_answers(bench_file(asked.bench, name, asked.questions)) if needed else {}
    return Bench(questions, load_prompts(asked.bench, asked.questions), references)


def _matches(bench: Bench, entries: Sequence[Entry], asked: Asked) -> dict[str, list[Match]]:
    """Entry -> what is asked of it."""
    if asked.baseline is None:
        return {entry.name: list(single_matches(bench, entry.answers)) for entry in entries}
    others = load_entries([asked.baseline], asked.bench)
    if len(others) != 1:
        raise ConfigError(f"--baseline {asked.baseline}: holds {len(others)} sets of answers; name one")
    base = others[0]
    if base.name in {entry.name for entry in entries}:
        raise DataError(f"{base.name}: is both judged and the baseline")
    check_models([*entries, base])
    return {entry.name: list(pairwise_matches(bench, entry.answers, base.answers)) for entry in entries}


def _tell(outcome: Outcome, purse: Purse, say: Callable[[str], None]) -> None:
    paid = f", {purse.spent:.2f} USD" if purse.spent else ""
    say(f"{outcome.rated} with a verdict; {purse.asked:,} tokens in, {purse.replied:,} out{paid}")
    if outcome.unrated or outcome.unasked:
        say(f"{outcome.unrated} replies without a verdict, {outcome.unasked} without a reply: run again to ask anew")
    for problem, count in outcome.failed.most_common(5):
        say(f"  {count} x {problem}")


def _written(
    journal: Journal,
    settings: Settings,
    entries: Sequence[Entry],
    matches: dict[str, list[Match]],
    asked: Asked,
    out: Path,
) -> str:
    name = settings.model
    judged: dict[str, Judged] = {
        entry: [(match, journal.lines.get(key_of(settings, match))) for match in part]
        for entry, part in matches.items()
    }
    kind = "single" if asked.baseline is None else "pair"
    rows = {entry: list((single_rows if kind == "single" else pair_rows)(part, name)) for entry, part in judged.items()}
    path = out / "model_judgment" / f"{name.replace('/', '_')}_{kind}.jsonl"
    write_rows(path, [row for part in rows.values() for row in part])
    if asked.baseline is not None:
        return table(
            {entry: win_figures(part) for entry, part in rows.items()},
            f"wins against {asked.baseline.stem}",
        )
    figures = {entry: score_figures(part) for entry, part in judged.items()}
    for entry in entries:
        write_results(out, entry, asked.bench, name, judged[entry.name])
    return table(figures | seed_rows(figures, _groups(entries).get), "score, 1 to 10")


def _groups(entries: Sequence[Entry]) -> dict[str, str | None]:
    """Entry -> the name of those that differ from it in their seed alone; told apart where two groups share a name."""
    named = {entry.group: entry.group.partition(" [")[0] for entry in entries if entry.group}
    alone = {group for group, name in named.items() if list(named.values()).count(name) == 1}
    return {entry.name: named[entry.group] if entry.group in alone else entry.group for entry in entries}
