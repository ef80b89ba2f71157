"""Sets that are not whole never give a plain score: n/N beside each figure, exit code 3, in `judge` and in `report`."""

import json
import re
import shutil
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.judging import command, judged, rows
from helpers.server import GOOD, completion
from helpers.tiny import build_model

from intactkv_eval.commands.evaluate import run_lm_eval
from intactkv_eval.judge.scores import figure_of
from intactkv_eval.report.collect import collect
from intactkv_eval.report.page import page
from intactkv_eval.report.tables import as_json, markdown

SIZE = 10


@pytest.fixture(scope="module")
def evaluated(tokenizer, tmp_path_factory):
    """One run of an intact cell on ten questions, and what else lm_eval would write: the baseline, another seed, a limit."""
    folder = tmp_path_factory.mktemp("evaluated")
    bench, model = write_bench(folder / "data", SIZE), folder / "llama"
    build_model("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    run_lm_eval(
        ["--model_args", f"pretrained={model},dtype=float32,weights=rtn,bits=3,group_size=32,pivot=bos", "--tasks", "mt_bench",
         "--metadata", json.dumps({"questions": str(bench), "seed": 42}), "--batch_size", "10", "--gen_kwargs", "max_gen_toks=4",
         "--device", "cpu", "--log_samples", "--output_path", str(folder / "made")]
    )  # fmt: skip
    for name, intact, seed in (("bos42", True, 42), ("bos43", True, 43), ("none42", False, 42), ("none43", False, 43)):
        derived(folder / "made", folder / "runs" / name, intact, seed)
    derived(folder / "made", folder / "runs" / "cut", True, 42, limit=4)
    return folder


def derived(made, place, intact, seed, limit=None):
    """The run as of another pivot and seed, whose answers differ."""
    results, samples = next(made.rglob("results_*.json")), next(made.rglob("samples_*.jsonl"))
    content = json.loads(results.read_text())
    content["config"]["intactkv"]["cell"]["pivot"]["intact"] = intact
    content["configs"]["mt_bench"]["metadata"]["seed"] = seed
    if limit:
        content["config"]["limit"] = float(limit)
        content["n-samples"]["mt_bench"]["effective"] = limit
    found = [json.loads(line) for line in samples.read_text().splitlines()][:limit]
    for row in found:
        row["resps"][0][0][0][0] += f" {intact} {seed}"
    place.mkdir(parents=True)
    (place / results.name).write_text(json.dumps(content))
    lines(place / samples.name, found)


@pytest.fixture
def runs(evaluated, tmp_path):
    return Path(shutil.copytree(evaluated / "runs", tmp_path / "runs"))


@pytest.fixture
def large(evaluated):
    return evaluated / "data"


def lacking(*marks):
    return lambda prompt, before: (200, json.dumps(completion("none"))) if any(m in prompt for m in marks) else GOOD


def test_the_average_is_fastchats_and_that_of_whole_questions_is_named(server, bench, tmp_path, answer_file):
    """Second turns of question 1 without a verdict: two averages, both shown, neither as if it were of all."""
    server.behave = lacking("First 1?|")
    table, said = judged(server, [answer_file], bench, tmp_path / "out", attempts=1)
    found = [row for row in rows(tmp_path / "out") if row["score"] != -1]
    over_rows = mean(row["score"] for row in found)
    whole = mean(mean(row["score"] for row in found if row["question_id"] == i) for i in range(2, 6))
    assert over_rows != pytest.approx(whole, abs=0.01)
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert re.fullmatch(rf"{over_rows:.2f} \(4/5\)", cells[2])
    assert re.fullmatch(rf"{whole:.2f} \(4/5\)", cells[3])
    assert table.splitlines()[0].split("|")[2:4] == [" all ", " whole questions "]
    assert re.fullmatch(r"[\d.]+", cells[4]), "every first turn is judged"
    assert "(4/5)" in cells[5]
    assert "one: 4 of 5 questions are judged whole, 1 verdicts of what was answered are missing" in said


def test_answers_to_a_part_of_the_questions(server, bench, tmp_path, called):
    part = lines(tmp_path / "part.jsonl", answers_of("part", (1, 2, 3)))
    arguments = command(server, part, bench, tmp_path / "out")[3:]
    code, said = called(*arguments)
    assert code == 3
    assert "incomplete: part: 3 of 5 questions are judged whole" in said
    assert called(*arguments, "--allow-partial")[0] == 0
    table, _ = judged(server, [part], bench, tmp_path / "out")
    cells = [cell.strip() for cell in table.splitlines()[-1].split("|")]
    assert all("(3/5)" in cell for cell in cells[2:6])
    assert "(" not in cells[6], "math: its one question of one is judged"


def test_a_choice_that_is_missing_is_a_question_that_is_not_whole(server, bench, tmp_path):
    cut = answers_of("cut", choices=2)
    cut[0]["choices"].pop()
    _, said = judged(server, [lines(tmp_path / "cut.jsonl", cut)], bench, tmp_path / "out")
    assert "cut: 4 of 5 questions are judged whole" in said


def test_a_whole_set_ends_with_0_and_a_plain_score(server, bench, answer_file, tmp_path, called):
    code, said = called(*command(server, answer_file, bench, tmp_path / "out")[3:])
    assert (code, "incomplete" in said) == (0, False)


def test_a_run_with_a_limit_is_no_score_of_the_bench(server, runs, large, tmp_path, called):
    out = tmp_path / "out"
    table, _ = judged(server, [runs / "cut"], large, out)
    assert "(4/10)" in table
    report = markdown(collect([out])[0])
    assert "limit 4, 4/10 questions judged whole)" in report
    assert re.search(r"\| \d\.\d+ \(4/10\) \|", report)
    code, said = called("report", out)
    assert code == 3
    assert re.search(r"results_.*json: 4/10 questions are judged whole", said)
    written = tmp_path / "report.html"
    assert called("report", out, "--out", written)[0] == 3
    assert written.is_file(), "it is written all the same"
    assert called("report", out, "--allow-partial")[0] == 0
    assert '"judged": "4/10"' in page(collect([out])[0])
    assert json.loads(as_json(collect([out])[0]))[0]["judged"] == "4/10"


def test_the_results_hold_fastchats_average_and_what_is_missing(server, runs, large, tmp_path):
    out = tmp_path / "out"
    server.behave = lacking("First 1?|", "First 2?|")
    judged(server, [runs / "bos42"], large, out, attempts=1)
    found = [row for row in rows(out) if row["score"] != -1]
    content = json.loads(next(out.rglob("results_*.json")).read_text())
    assert content["results"]["mt_bench"]["score,none"] == pytest.approx(mean(row["score"] for row in found))
    metadata = content["configs"]["mt_bench"]["metadata"]
    assert metadata["judged"] == {"questions": 8, "of": 10, "missing": 2}
    assert metadata["references"].startswith("judge (sha256 ")
    (run,) = collect([out])[0]
    score = run.scores["mt_bench"]
    means = [mean(row["score"] for row in found if row["question_id"] == i) for i in range(3, 11)]
    assert score.value == pytest.approx(mean(means))
    assert list(score.values.values()) == pytest.approx(means)
    assert score.stderr == pytest.approx(stdev(means) / 8**0.5)


@pytest.mark.parametrize("size", [7, 8, 20])
def test_the_error_of_a_mean_over_rows_is_over_questions(size):
    """Of questions with two rows each it is that of their means; of cut ones that of a ratio, by the textbook."""
    draw = np.random.default_rng(size)
    means = draw.uniform(1, 10, size)
    whole = figure_of([(q, m + s) for q, m in enumerate(means) for s in (0.5, -0.5)], dict.fromkeys(range(size), 2))
    cut = [(q, m + s) for q, m in enumerate(means) for s in (0.5, -0.5) if q > 2 or s > 0]
    part = figure_of(cut, dict.fromkeys(range(size), 2))
    assert (whole.questions, part.questions, part.of) == (size, size - 3, size)
    if size < 8:
        assert (whole.stderr, part.stderr) == (None, None)
        return
    assert whole.stderr == pytest.approx(np.std(means, ddof=1) / size**0.5)
    values = np.array([value for _, value in cut])
    of = np.array([question for question, _ in cut])
    rest = [(values[of == question] - values.mean()).sum() for question in range(size)]
    assert part.stderr == pytest.approx((size / (size - 1) * np.square(rest).sum()) ** 0.5 / len(cut))


def test_sets_with_other_questions_missing_are_not_paired(server, runs, large, tmp_path):
    out = tmp_path / "out"
    server.behave = lacking("First 1?|")
    judged(server, [runs / "bos42"], large, out, attempts=1)
    server.behave = lacking("First 2?|")
    judged(server, [runs / "none42"], large, out, attempts=1)
    report = markdown(collect([out])[0])
    assert "not the same ones" in report.split("Not compared with a baseline:")[1]


def test_runs_judged_beside_other_references_are_not_paired(server, runs, large, tmp_path):
    out = tmp_path / "out"
    judged(server, [runs / "none42"], large, out)
    judged(server, [runs / "bos42"], large, out, references="gpt-4")
    report = markdown(collect([out])[0])
    assert "references of judge)" in report
    assert "references of gpt-4" in report
    assert "references (gpt-4 (sha256 " in report.split("Not compared with a baseline:")[1]


def test_judge_and_report_print_one_error_for_several_seeds(server, runs, large, tmp_path):
    """The standard error over questions of the mean over seeds; the deviation of the seeds is the spread."""
    out = tmp_path / "out"
    table, _ = judged(server, [runs / name for name in ("bos42", "bos43", "none42", "none43")], large, out)
    scores = {}
    for row in rows(out):
        if "pivot-bos" in row["model"]:
            scores.setdefault(row["question_id"], {}).setdefault(row["model"], []).append(row["score"])
    means = [mean(mean(one) for one in of.values()) for of in scores.values()]
    seeds = [mean(mean(of[name]) for of in scores.values()) for name in scores[1]]
    wanted = f"{mean(means):.2f} ± {stdev(means) / SIZE**0.5:.2f} (spread {stdev(seeds):.2f})"
    assert f"| llama_rtn-w3g32_pivot-bos, 2 seeds | {wanted} |" in table
    report = markdown(collect([out])[0])
    wanted = f"{mean(means):.4f} ± {stdev(means) / SIZE**0.5:.4f} (spread {stdev(seeds):.4f})"
    assert wanted in report


@pytest.mark.parametrize("damage", [[], {}, {"questions": "x", "of": 10}, {"questions": 11, "of": 10}, None])
def test_a_judges_results_that_do_not_say_how_whole_they_are(server, runs, large, tmp_path, called, damage):
    out = tmp_path / "out"
    judged(server, [runs / "bos42"], large, out)
    path = next(out.rglob("results_*.json"))
    content = json.loads(path.read_text())
    content["configs"]["mt_bench"]["metadata"]["judged"] = damage
    path.write_text(json.dumps(content))
    code, said = called("report", out)
    assert (code, said.count("\n")) == (2, 1)
    assert "remove them, and run `intactkv judge` again" in said or damage is not None
