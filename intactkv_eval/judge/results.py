"""Scores as lm_eval's own results beside the run that they judge, so that `intactkv report` pairs and compares them.

<out>/results/<judge>/<name>/results_<stamp>.json, samples_<bench>_<stamp>.jsonl: {"doc_id", "score"}

    score                   FastChat's mean over judged rows
    score_whole_questions   over the questions that are judged whole, whose means are the samples: what the report pairs
    metadata.judged         {"questions": judged whole, "of": that the bench has, "missing": verdicts on answers}
    metadata.references     whose reference answers stood beside, and which file; metadata.judge_prompts: SHA-256
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intactkv_eval.judge.entries import AnswerSet, lettered
from intactkv_eval.judge.scores import ALL, WHOLE, Scores
from intactkv_eval.report.incomplete import JUDGED, PAIRED
from intactkv_eval.report.samples import samples_of
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import write_atomic, write_jsonl
from intactkv_eval.storage.limits import read_bytes


@dataclass(frozen=True)
class JudgeRecord:
    """How a bench was judged. name: that of the judge's files. references: their label, None where none was needed."""

    bench: str
    judge: str
    name: str
    references: str | None
    prompts: str

    @property
    def protocol(self) -> str:
        """For a column's title."""
        beside = f", references of {self.references.partition(' (')[0]}" if self.references else ""
        return f"{self.bench} judged by {self.judge}{beside}"


def write_results(out: Path, entry: AnswerSet, record: JudgeRecord, scores: Scores) -> Path | None:
    """The results file. None where the entry is no run, or no question is judged whole: then those of earlier answers
    go.
    """
    if entry.run is None:
        return None
    source, bench, means = entry.run.path, record.bench, scores.means[WHOLE]
    path = out / "results" / lettered(record.name) / entry.name / source.name
    path.unlink(missing_ok=True)  # a kill between the two files would leave old figures beside new samples
    if not means:
        samples_of(path, bench).unlink(missing_ok=True)
        return None
    content = parse_json(read_bytes(source))
    whole = scores.figures[ALL]
    content["configs"][bench]["metadata"] |= {
        "protocol": record.protocol,
        "references": record.references,
        "judge_prompts": record.prompts,
        JUDGED: {"questions": whole.questions, "of": whole.of, "missing": whole.unrated},
    }
    counted = {"original": content["n-samples"][bench]["original"], "effective": len(means)}
    content |= {
        "results": {bench: {"alias": bench, "sample_len": len(means), **_figures(scores)}},
        "configs": {bench: content["configs"][bench]},
        "group_subtasks": {bench: []},
        "higher_is_better": {bench: {"score": True}},
        "n-samples": {bench: counted},
    }
    places = {question: place for place, question in enumerate(sorted(entry.answers))}
    write_jsonl(
        samples_of(path, bench), [{"doc_id": places[question], "score": mean} for question, mean in means.items()]
    )
    text = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _figures(scores: Scores) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for part, figure in scores.figures.items():
        name = {ALL: "score", WHOLE: PAIRED}.get(part, part.replace(" ", "_"))
        if figure.value is not None:
            row[f"{name},none"] = figure.value
            row[f"{name}_stderr,none"] = "N/A" if figure.stderr is None else figure.stderr
    return row
