"""Who is judged: answer files in FastChat's layout, or runs of lm_eval with their logged samples, by name.

A run's name says its cell and seed, so that two of them are told apart in every table.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from intactkv_eval.errors import DataError
from intactkv_eval.mt_bench.answers import Answer, Choice, answer_id, read_answers, write_answers
from intactkv_eval.report.collect import Run, read_run
from intactkv_eval.report.labels import pivot_label, weights_label
from intactkv_eval.report.planned import files_below
from intactkv_eval.report.samples import samples_of
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import read_jsonl
from intactkv_eval.storage.limits import read_bytes

_LONGEST = 200  # letters of a name; a file's may have 255


@dataclass(frozen=True)
class AnswerSet:
    """A model's answers by question. run: that they are from, if any.

    group: what tells runs apart that differ in more than their seed. seed: of their sampling. questions: SHA-256 of the
    file they answer.
    """

    name: str
    answers: dict[int, Answer]
    group: str | None = None
    run: Run | None = None
    seed: Any = None
    questions: str | None = None

    @property
    def model(self) -> str:
        """What its answers call their model."""
        return next((answer.model_id for answer in self.answers.values()), self.name)


def load_entries(sources: Iterable[Path], bench: str) -> list[AnswerSet]:
    """The entries of files and folders, each once.

    Raises DataError for a source without answers, a file with those of several models, a run without samples, or two
    entries of one name.
    """
    found: list[AnswerSet] = []
    for source in sources:
        if source.suffix == ".jsonl":
            found.append(_of_file(source))
            continue
        runs = [source] if source.is_file() else files_below(source)
        entries = [entry for entry in (_of_run(path, bench) for path in runs) if entry is not None]
        if not entries:
            raise DataError(f"{source}: no run of {bench} with this package's model class, nor a .jsonl of answers")
        found += entries
    names = [entry.name for entry in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{', '.join(twice)}: two sets of answers have this name; judge them one after another")
    check_models(found)
    return found


def check_models(entries: Sequence[AnswerSet]) -> None:
    """Raise DataError where two entries call their model by one name: their judgments could not be told apart."""
    named = [entry.model for entry in entries]
    twice = next((entry for entry in entries if named.count(entry.model) > 1), None)
    if twice is not None:
        both = ", ".join(entry.name for entry in entries if entry.model == twice.model)
        raise DataError(
            f"{both}: have one model_id ({twice.model}); give each answer file its own, or judge them apart"
        )


def export_answers(sources: Iterable[Path], out: Path, bench: str) -> list[Path]:
    """The answers of runs as FastChat's files, out/<name>.jsonl. Raises DataError where there are none."""
    written = []
    for entry in load_entries(sources, bench):
        path = out / f"{entry.name}.jsonl"
        write_answers(path, entry.answers.values())
        written.append(path)
    return written


def _of_file(path: Path) -> AnswerSet:
    answers = read_answers(path)
    models = sorted({answer.model_id for answer in answers.values()})
    if len(models) > 1:
        raise DataError(f"{path}: answers of {len(models)} models ({', '.join(models[:5])}); make a file of each")
    return AnswerSet(path.stem, answers)


def _of_run(path: Path, bench: str) -> AnswerSet | None:
    run = read_run(path)
    if run is None:
        return None
    content = parse_json(read_bytes(path))
    try:
        metadata = content.get("configs", {}).get(bench, {}).get("metadata") or {}
        if bench not in content["results"] or metadata.get("protocol") != bench:
            return None  # of another task, or a judge's own figures
        content["n-samples"][bench]["original"]  # what `write_results` tells, after all replies were paid for
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a whole results file of lm_eval ({type(error).__name__}: {error})") from None
    samples = samples_of(path, bench)
    if not samples.is_file():
        raise DataError(f"{path}: its answers were not logged; run lm_eval with --log_samples")
    base = run_name(run)
    name = lettered(f"{base}_seed{metadata['seed']}") if "seed" in metadata else base
    rows = [_answer(row, name, run.date) for row in read_jsonl(samples)]
    answers = {row.question_id: row for row in rows}
    alike = {key: value for key, value in metadata.items() if key != "seed"}
    asked = [content["config"].get("gen_kwargs"), alike, content.get("chat_template_sha"), sorted(answers)]
    apart = hashlib.sha256(f"{run.identity} {run.pivot_tokens} {json.dumps(asked, default=str)}".encode()).hexdigest()
    digest = str(metadata.get("data", "")).removeprefix("sha256:") or None
    return AnswerSet(name, answers, f"{base} [{apart[:6]}]", run, metadata.get("seed"), digest)


def run_name(run: Run) -> str:
    """Model, weights, KV and pivot, in letters that a file name can have."""
    cell = run.identity.cell
    kv = "" if cell.kv.bits == 16 else f"kv{cell.kv.bits}-{cell.kv.scheme}"
    parts = [
        PurePath(run.identity.made_from or cell.model.pretrained).name,
        weights_label(run.identity),
        kv,
        f"pivot-{pivot_label(cell)}",
    ]
    return lettered("_".join(lettered(part.replace("_", "-")) for part in parts if part))


def lettered(text: str) -> str:
    """The text in letters that a file name can have, and no longer than one can be."""
    found = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _answer(sample: dict[str, Any], name: str, date: float) -> Answer:
    try:
        choices = [
            Choice(index=index, turns=tuple(turn[0] for turn in response[0]))
            for index, response in enumerate(sample["resps"])
        ]
        question = sample["doc"]["question_id"]
        if not isinstance(question, int):
            raise TypeError(f"question_id {str(question)[:80]}")
        made = answer_id(name, question, choices)
        return Answer(question_id=question, answer_id=made, model_id=name, choices=tuple(choices), tstamp=date)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{name}: a logged sample is damaged ({type(error).__name__}: {error})") from None
