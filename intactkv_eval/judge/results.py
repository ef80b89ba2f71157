"""Scores as lm_eval's own results beside the run that they judge, so that `intactkv report` pairs and compares them.

<out>/results/<judge>/<name>/results_<stamp>.json, samples_<bench>_<stamp>.jsonl: {"doc_id", "score"}
"""

import json
from pathlib import Path

from intactkv_eval.documents import parse_json
from intactkv_eval.files import write_atomic, write_jsonl
from intactkv_eval.judge.entries import Entry, lettered
from intactkv_eval.judge.fastchat import Judged
from intactkv_eval.judge.scores import ALL, by_question, score_figures, whole_questions
from intactkv_eval.report.samples import samples_of


def write_results(out: Path, entry: Entry, bench: str, judge: str, judged: Judged) -> Path | None:
    """The results file, of the questions whose every turn and choice is rated: a mean over what is left of a question
    would compare first turns with second ones. None where the entry is no run, or no question is rated whole: then
    those of earlier answers go.
    """
    if entry.results is None:
        return None
    judged = whole_questions(judged)
    figures, questions = score_figures(judged), by_question(judged)
    path = out / "results" / lettered(judge) / entry.name / entry.results.name
    path.unlink(missing_ok=True)  # a kill between the two files would leave old figures beside new samples
    if not questions:
        samples_of(path, bench).unlink(missing_ok=True)
        return None
    content = parse_json(entry.results.read_bytes())
    row: dict[str, object] = {"alias": bench, "sample_len": len(questions)}
    for part, figure in figures.items():
        name = "score" if part == ALL else part.replace(" ", "_")
        if figure.value is not None:
            row[f"{name},none"] = figure.value
            row[f"{name}_stderr,none"] = "N/A" if figure.stderr is None else figure.stderr
    metadata = content["configs"][bench]["metadata"]
    metadata["protocol"] = f"{bench} judged by {judge}"
    counted = {"original": content["n-samples"][bench]["original"], "effective": len(questions)}
    content |= {
        "results": {bench: row},
        "configs": {bench: content["configs"][bench]},
        "group_subtasks": {bench: []},
        "higher_is_better": {bench: {"score": True}},
        "n-samples": {bench: counted},
    }
    places = {question: place for place, question in enumerate(sorted(entry.answers))}
    rows = [{"doc_id": places[question], "score": row["score"]} for question, row in questions.items()]
    write_jsonl(samples_of(path, bench), rows)
    whole = json.dumps(content, indent=2, ensure_ascii=False)
    write_atomic(path, lambda partial: partial.write_text(whole, encoding="utf-8"))
    return path
