"""What the report and the judge read: results and samples of lm_eval, alone and beside those that they are compared with,
a sweep's plan, answers, a judge's replies and its journal.
"""

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import mutate
from kinds import Target, file_read

from intactkv_eval.cell.spec import WeightSpec
from intactkv_eval.judge.entries import export_answers, load_entries
from intactkv_eval.judge.journal import Line, read_lines
from intactkv_eval.judge.verdict import verdict_of
from intactkv_eval.mt_bench.answers import read_answers
from intactkv_eval.report.collect import collect
from intactkv_eval.report.page import _figures, page
from intactkv_eval.report.planned import absent_of
from intactkv_eval.report.significance import MIN_TEST
from intactkv_eval.report.tables import FORMATS, as_json, markdown

_DAMAGED, _FULL, _BASE = (f"2026-01-0{day}T00-00-00" for day in (3, 1, 2))


def jsonl(changed: object) -> bytes:
    """Rows as lines; what is no list of rows as one line."""
    listed = changed if isinstance(changed, list) else [changed]
    return b"\n".join(json.dumps(row).encode("utf-8", "surrogatepass") for row in listed)


def _lines(rows: object) -> Callable[[Random], bytes]:
    def make(draw: Random) -> bytes:
        data = jsonl(mutate.of_value(rows, draw))
        return mutate.of_bytes(data, draw) if draw.random() < 0.3 else data

    return make


def results_targets(folder: Path) -> dict[str, Target]:
    seeds = folder / "seeds" / "results"
    results = json.loads(next(seeds.glob("results_*.json")).read_text())
    samples = next(seeds.glob("samples_*.jsonl"))
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    plan = [{"key": "a", "task": "ppl_x", "seed": None, "cell": results["config"]["intactkv"]["cell"], "hf_arguments": {},
             "quantization": None}]  # fmt: skip
    for name in ("one", "two", "three", "four"):
        shutil.copytree(seeds, folder / name)
    other = copy.deepcopy(results)  # the same measurement with another seed: the two are merged
    for task in other["configs"].values():
        task["metadata"] = {**task["metadata"], "seed": 2}

    def report(path: Path) -> None:
        runs, _ = collect([path.parent])
        absent = absent_of([path.parent])
        for make in FORMATS.values():
            make(runs, absent).encode()
        page(runs, (), absent).encode()

    return {
        "results": Target(
            lambda draw: mutate.of_json(results, draw),
            file_read(folder / "one", next(seeds.glob("results_*")).name, report),
            results,
        ),
        "seeds": Target(
            lambda draw: mutate.of_json(other, draw),
            file_read(folder / "four", "results_2026-01-01T00-00-00.json", report),
            other,
        ),
        "samples": Target(_lines(rows), file_read(folder / "two", samples.name, report), rows, jsonl),
        "plan": Target(
            lambda draw: mutate.of_json(plan, draw), file_read(folder / "three", "sweep.json", report), plan
        ),
    }


PICTURES = [
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"<?xml version='1.0'?>\n<!DOCTYPE svg PUBLIC 'a' 'b'>\n<!-- c -->\n<svg width='1'/>",
    b"\x89PNG\r\n\x1a\n",
]


def shown(path: Path) -> None:
    """A picture of a folder, as the page shows it."""
    _figures([path.parent])


def judge_targets(folder: Path) -> dict[str, Target]:
    answer = {"question_id": 81, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["a", "b"]}],
              "tstamp": 1.0}  # fmt: skip
    replies = [
        b"I rate it [[7]].",
        b"Rating: [[10]]",
        b"[[A]] or [[B]]",
        b"rating: [3.5]",
        b"nums[5] [[0]]",
        b"I give it a [7].",
        b"```\n[3]\n``` score: [5]",
    ]

    def verdicts(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        rating, winner = verdict_of("single", text), verdict_of("pairwise", text)
        assert rating is None or 0 <= float(rating) <= 10
        assert winner in {None, "A", "B", "tie"}

    def reading(path: Path) -> None:
        read_answers(path)
        load_entries([path], "mt_bench")

    return {
        "answers": Target(
            lambda draw: mutate.of_json(answer, draw), file_read(folder, "answers.jsonl", reading), answer
        ),
        "reply": Target(lambda draw: mutate.of_bytes(draw.choice(replies), draw), verdicts),
    }


def compared_targets(folder: Path) -> dict[str, Target]:
    """An intact run, or its samples, damaged beside the baseline and the full precision that it is compared with."""
    seeds = folder / "seeds" / "results"
    results = json.loads(next(seeds.glob("results_*.json")).read_text())
    (task,) = results["configs"]
    logged = [json.loads(line) for line in next(seeds.glob("samples_*.jsonl")).read_text().splitlines()]
    rows = [{**row, "doc_id": place} for place, row in enumerate(logged * (-(-MIN_TEST // len(logged))))]
    cell = results["config"]["intactkv"]["cell"]
    computed = {**cell, "pivot": {**cell["pivot"], "intact": False}}
    cells = {_FULL: ({**computed, "weights": WeightSpec().model_dump(mode="json")}, 0.9), _BASE: (computed, 1.1)}
    for place in (folder / "compared", folder / "compared samples"):
        place.mkdir()
        for stamp, (one, factor) in {**cells, _DAMAGED: (cell, 1.0)}.items():
            said, made = _run_of(results, rows, one, factor)
            (place / f"results_{stamp}.json").write_text(json.dumps(said))
            (place / f"samples_{task}_{stamp}.jsonl").write_bytes(jsonl(made))

    def report(path: Path) -> None:
        runs, _ = collect([path.parent])
        markdown(runs).encode()
        as_json(runs).encode()

    whole = collect([folder / "compared"])[0]
    assert " [" in markdown(whole).split("`pivot` none")[0], "all three are compared"
    return {
        "compared": Target(
            lambda draw: mutate.of_json(results, draw),
            file_read(folder / "compared", f"results_{_DAMAGED}.json", report),
            results,
        ),
        "compared-samples": Target(
            _lines(rows),
            file_read(folder / "compared samples", f"samples_{task}_{_DAMAGED}.jsonl", report),
            rows,
            jsonl,
        ),
    }


def _run_of(results: Any, rows: list[Any], cell: Any, factor: float) -> tuple[Any, list[Any]]:
    """The run as if each document had `factor` times as many nats."""
    said = copy.deepcopy(results)
    said["config"]["intactkv"]["cell"] = cell
    for figures in said["results"].values():
        figures["nll,none"] *= factor
        figures["perplexity,none"] = math.exp(figures["nll,none"])
    return said, [{**row, "nll": row["nll"] * factor} for row in rows]


def answered_targets(folder: Path) -> dict[str, Target]:
    """A run of MT-Bench and its answers, as `intactkv answers` and `intactkv judge` read them, and a judge's journal."""
    results = json.loads(next((folder / "seeds" / "results").glob("results_*.json")).read_text())
    config = {"metadata": {"protocol": "mt_bench", "seed": 42, "data": "sha256:x"}}
    said = {
        **results, "results": {"mt_bench": {"answer_tokens,none": 3.0}}, "configs": {"mt_bench": config},
        "group_subtasks": {"mt_bench": []}, "n-samples": {"mt_bench": {"original": 2, "effective": 2}},
    }  # fmt: skip
    rows = [{"doc_id": place, "doc": {"question_id": 81 + place}, "resps": [[[["a"], ["b"]]]]} for place in (0, 1)]
    for place in (folder / "answered", folder / "answered samples"):
        place.mkdir()
        (place / "results_1.json").write_text(json.dumps(said))
        (place / "samples_mt_bench_1.jsonl").write_bytes(jsonl(rows))
    assert export_answers([folder / "answered"], folder / "exported", "mt_bench")
    line = Line(key="k", judge="j", server=None, prompt="p", kind="single", models=("m",), question_id=81, turn=1, choice=0,
                user_prompt="u", reply="[[7]]", finish="stop", tokens=(3, 4), verdict=7.0, attempt=1, tstamp=1.0)  # fmt: skip
    journal = [line.model_dump(mode="json")] * 2

    def export(path: Path) -> None:
        for written in export_answers([path.parent], folder / "exported", "mt_bench"):
            assert written.parent == folder / "exported"
            written.unlink()

    def replies(path: Path) -> None:
        read_lines(path, path.read_bytes() + b"\n")

    return {
        "answered": Target(
            lambda draw: mutate.of_json(said, draw), file_read(folder / "answered", "results_1.json", export), said
        ),
        "answered-samples": Target(
            _lines(rows), file_read(folder / "answered samples", "samples_mt_bench_1.jsonl", export), rows, jsonl
        ),
        "journal": Target(_lines(journal), file_read(folder, "replies.jsonl", replies), journal, jsonl),
    }
