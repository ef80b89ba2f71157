"""`intactkv judge`: from answers to scores, with everything kept that was paid for."""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from tqdm import tqdm

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.client import Judge, JudgeServer
from intactkv_eval.judge.cost import BudgetTracker
from intactkv_eval.judge.entries import AnswerSet, check_models, load_entries
from intactkv_eval.judge.journal import opened
from intactkv_eval.judge.matches import Bench, pairwise_matches, single_matches
from intactkv_eval.judge.options import JudgeOptions
from intactkv_eval.judge.references import load_references
from intactkv_eval.judge.run import Outcome, Worker, judge_all, missing
from intactkv_eval.judge.written import Groups, Judgement, JudgeReport, written
from intactkv_eval.mt_bench.questions import load_prompts, load_questions


def judge_command(
    sources: Sequence[Path], settings: JudgeServer, options: JudgeOptions, out: Path, say: Callable[[str], None]
) -> JudgeReport:
    """Judge what has no verdict yet; the table of scores, or of wins in pairs.

    Raises ConfigError or DataError for bad input, and where the judge refuses or never answers; what came is kept.
    """
    BudgetTracker(options.prices, options.cap)  # refuses a cap without prices before anything is read
    entries, baseline = _entries(sources, options)
    bench = _bench(settings.model, options, [*entries, *baseline])
    groups = _groups(bench, entries, baseline, options)
    if bench.references.label:
        say(f"reference answers: {bench.references.label}")
    with opened(out) as journal:
        every = [match for part in groups.values() for match in part]
        left = missing(journal, settings, every)
        budget = BudgetTracker(options.prices, options.cap, journal.spent(options.prices))
        counted = len(every) - len(left)
        say(f"{len(every)} to judge, {counted} have their verdict; {budget.estimate(left, settings.max_tokens)}")
        if options.dry:
            return JudgeReport("nothing was asked (--dry-run)")
        worker = Worker(journal, Judge(settings), budget, options.attempts)
        with tqdm(total=len(left), desc=f"Judging ({settings.model})") as bar:
            outcome = judge_all(worker, every, options.concurrency, bar.update)
        _tell(outcome, worker, say)
        report = written(Judgement(settings.model, options, bench, entries, out), groups, journal, settings)
    capped = [f"the cap of {options.cap:.2f} USD is reached; raise --cap to go on"] if budget.is_reached else []
    return JudgeReport(report.table, (*capped, *report.incomplete))


def _entries(sources: Sequence[Path], options: JudgeOptions) -> tuple[list[AnswerSet], list[AnswerSet]]:
    """Those that are judged, and the baseline where there is one."""
    if options.all_pairs and options.baseline is not None:
        raise ConfigError("--pairwise-all: judges every two of the models; with --baseline, name the one or the other")
    entries = load_entries(sources, options.bench)
    if options.all_pairs and len(entries) < 2:
        raise ConfigError(f"--pairwise-all: needs two models or more; there is {entries[0].name} alone")
    if options.baseline is None:
        return entries, []
    others = load_entries([options.baseline], options.bench)
    if len(others) != 1:
        raise ConfigError(f"--baseline {options.baseline}: holds {len(others)} sets of answers; name one")
    if others[0].name in {entry.name for entry in entries}:
        raise DataError(f"{others[0].name}: is both judged and the baseline")
    check_models([*entries, *others])
    return entries, others


def _bench(judge: str, options: JudgeOptions, entries: Sequence[AnswerSet]) -> Bench:
    found = load_questions(options.bench, options.questions)
    other = next((entry.name for entry in entries if entry.questions not in {None, found.digest}), None)
    if other is not None:
        raise DataError(
            f"{other}: answers to other questions than these; name the folder that it was run with (--questions)"
        )
    questions = {question.question_id: question for question in found.questions}
    answered = [questions[place] for entry in entries for place in entry.answers if place in questions]
    references = load_references(judge, options.references, options.bench, options.questions, answered)
    return Bench(questions, load_prompts(options.bench, options.questions), references)


def _groups(bench: Bench, entries: Sequence[AnswerSet], baseline: Sequence[AnswerSet], options: JudgeOptions) -> Groups:
    if not options.is_pairwise:
        return {entry.name: list(single_matches(bench, entry.answers)) for entry in entries}
    pairs = combinations(entries, 2) if options.all_pairs else ((entry, baseline[0]) for entry in entries)
    return {
        f"{one.name} against {other.name}": list(pairwise_matches(bench, one.answers, other.answers))
        for one, other in pairs
    }


def _tell(outcome: Outcome, worker: Worker, say: Callable[[str], None]) -> None:
    budget = worker.budget
    paid = f", {budget.spent - budget.before:.2f} USD" if budget.prices.are_given else ""
    say(f"{outcome.rated} with a verdict; {budget.tokens[0]:,} tokens in, {budget.tokens[1]:,} out{paid}")
    if worker.judge.spelling.temperature is None:
        say(f"{worker.judge.settings.model} takes no temperature: it was asked at its own")
    if outcome.unrated or outcome.unasked:
        say(f"{outcome.unrated} replies without a verdict, {outcome.unasked} without a reply: run again to ask anew")
    for problem, count in outcome.failed.most_common(5):
        say(f"  {count} x {problem}")
