"""What `intactkv judge` leaves and prints: judgments in FastChat's layout, results for the report, and the table."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from intactkv_eval.judge.client import JudgeServer
from intactkv_eval.judge.entries import AnswerSet
from intactkv_eval.judge.fastchat import Judged, pair_rows, single_rows, write_rows
from intactkv_eval.judge.journal import Journal
from intactkv_eval.judge.matches import Bench, Match
from intactkv_eval.judge.options import JudgeOptions
from intactkv_eval.judge.results import JudgeRecord, write_results
from intactkv_eval.judge.run import key_of
from intactkv_eval.judge.scores import ALL, Figure, scores_of
from intactkv_eval.judge.seed_rows import seed_rows
from intactkv_eval.judge.table import score_table, win_table
from intactkv_eval.judge.wins import wins_of
from intactkv_eval.mt_bench.sources import PROMPTS, bench_file

Groups = Mapping[str, Sequence[Match]]
"""What is asked, by whose answers it is on: an entry's name, or both of a pair."""


@dataclass(frozen=True)
class JudgeReport:
    """What is printed. incomplete: what the table lacks, a line each; empty where everything is judged."""

    table: str
    incomplete: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Whose answers were judged, by whom, how, and where it is written."""

    judge: str
    options: JudgeOptions
    bench: Bench
    entries: Sequence[AnswerSet]
    out: Path

    @property
    def name(self) -> str:
        """Of the judge's files: with other references than its own they lie beside those with its own."""
        references = self.bench.references.name
        return self.judge if references in {None, self.judge} else f"{self.judge}_references-{references}"

    @property
    def label(self) -> str:
        """For the table's heading."""
        references = self.bench.references.name
        return f"judge {self.judge}" + (f", references of {references}" if references else "")

    def rows_path(self, kind: str) -> Path:
        """Of the judgments in FastChat's layout."""
        return self.out / "model_judgment" / f"{self.name.replace('/', '_')}_{kind}.jsonl"

    def record(self) -> JudgeRecord:
        """For the results."""
        prompts = bench_file(self.options.bench, PROMPTS, self.options.questions).read_bytes()
        digest = f"sha256:{hashlib.sha256(prompts).hexdigest()}"
        return JudgeRecord(self.options.bench, self.judge, self.name, self.bench.references.label, digest)


def written(judgement: Judgement, groups: Groups, journal: Journal, settings: JudgeServer) -> JudgeReport:
    """Write what the journal holds of these matches, and make the table."""
    judged = {
        name: [(match, journal.reply_to(key_of(settings, match))) for match in part] for name, part in groups.items()
    }
    return (_pairs if judgement.options.is_pairwise else _scores)(judgement, judged)


def _scores(judgement: Judgement, judged: Mapping[str, Judged]) -> JudgeReport:
    rows = [row for part in judged.values() for row in single_rows(part, judgement.judge)]
    write_rows(judgement.rows_path("single"), rows)
    questions = judgement.bench.questions.values()
    scores = {name: scores_of(part, questions) for name, part in judged.items()}
    record = judgement.record()
    for entry in judgement.entries:
        write_results(judgement.out, entry, record, scores[entry.name])
    figures = {name: one.figures for name, one in scores.items()}
    table = score_table({**figures, **seed_rows(judgement.entries, scores)}, f"score, 1 to 10 ({judgement.label})")
    return JudgeReport(table, _incomplete({name: row[ALL] for name, row in figures.items()}))


def _pairs(judgement: Judgement, judged: Mapping[str, Judged]) -> JudgeReport:
    rows = [row for part in judged.values() for row in pair_rows(part, judgement.judge)]
    write_rows(judgement.rows_path("pair"), rows)
    questions = judgement.bench.questions.values()
    wins = {entry.name: wins_of(entry.model, rows, questions) for entry in judgement.entries}
    baseline = judgement.options.baseline
    against = "each other" if baseline is None else baseline.stem
    table = win_table(wins, f"pairs against {against} ({judgement.label})")
    return JudgeReport(table, _incomplete({name: one.figures[ALL] for name, one in wins.items()}))


def _incomplete(figures: Mapping[str, Figure]) -> tuple[str, ...]:
    return tuple(
        f"{name}: {figure.questions} of {figure.of} questions are judged whole"
        + (f", {figure.unrated} verdicts of what was answered are missing" if figure.unrated else "")
        for name, figure in figures.items()
        if not figure.is_whole
    )
