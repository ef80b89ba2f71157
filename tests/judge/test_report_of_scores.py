"""From lm_eval's run to the report: scores stand beside their baseline, seeds are told apart and averaged."""

import json
import shutil
from pathlib import Path

import pytest
from helpers.judge_bench import write_bench
from helpers.judging import judged, rows
from helpers.server import GOOD, completion, rating_of
from helpers.tiny import build_model

from intactkv_eval.commands.evaluate import run_lm_eval
from intactkv_eval.errors import ConfigError, DataError, IntactKVError
from intactkv_eval.judge.entries import export_answers
from intactkv_eval.mt_bench.answers import read_answers
from intactkv_eval.report.collect import collect
from intactkv_eval.report.tables import markdown


@pytest.fixture(scope="module")
def made_once(tokenizer, tmp_path_factory):
    """Runs of a quantized cell, intact and not, with two seeds."""
    folder = tmp_path_factory.mktemp("runs")
    bench, model = write_bench(folder / "data"), folder / "llama"
    build_model("llama").save_pretrained(model)
    tokenizer.save_pretrained(model)
    for name, pivot, seed in (("none", "none", 42), ("none2", "none", 43), ("intact", "bos", 42), ("other", "bos", 43)):
        run_lm_eval(
            ["--model_args", f"pretrained={model},dtype=float32,weights=rtn,bits=3,group_size=32,pivot={pivot}",
             "--tasks", "mt_bench", "--metadata", json.dumps({"questions": str(bench), "seed": seed}), "--batch_size", "5",
             "--gen_kwargs", "max_gen_toks=5", "--device", "cpu", "--log_samples", "--output_path", str(folder / "runs" / name)]
        )  # fmt: skip
    return folder / "runs"


@pytest.fixture
def runs(made_once, tmp_path):
    return Path(shutil.copytree(made_once, tmp_path / "runs"))


def test_scores_go_into_the_report(server, runs, bench):
    out = runs / "judged"
    table, _ = judged(server, [runs], bench, out)
    names = [f"llama_rtn-w3g32_pivot-{pivot}_seed{seed}" for pivot in ("bos", "none") for seed in (42, 43)]
    assert sorted({row["model"] for row in rows(out)}) == names
    assert "| llama_rtn-w3g32_pivot-bos, 2 seeds |" in table
    assert "| llama_rtn-w3g32_pivot-none, 2 seeds |" in table
    found, foreign = collect([runs])
    assert not foreign
    report = markdown(found)
    assert "answer_tokens" not in report
    assert "mt_bench score↑ (mt_bench judged by judge, references of judge)" in report
    scores = {run.path.parent.name: run.scores["mt_bench"] for run in found if "mt_bench" in run.scores}
    kept = [row["score"] for row in rows(out) if row["model"] == names[0]]
    assert scores[names[0]].value == pytest.approx(sum(kept) / len(kept))
    assert len(scores[names[0]].values) == 5
    line = next(line for line in report.splitlines() if "| bos |" in line)
    change = (sum(scores[name].value for name in names[:2]) - sum(scores[name].value for name in names[2:])) / 2
    assert f"| {change:+.4f} |" in line, "against its own baseline over both seeds; five questions have no error"
    again, _ = judged(server, [runs], bench, out)
    assert again == table, "a judge's own figures are nobody's answers"


def test_answers_that_nobody_has_judged_have_no_figure(runs):
    with pytest.raises(ConfigError, match="intactkv judge"):
        markdown(collect([runs])[0])


def test_questions_that_are_rated_in_part_make_no_figure(server, runs, bench, tmp_path):
    """Second turns without a verdict, on one side alone: a mean of first turns is no score to compare."""
    server.behave = lambda prompt, before: (200, json.dumps(completion("none"))) if "First 1?|" in prompt else GOOD
    out = tmp_path / "out"
    judged(server, [runs / "intact"], bench, out, attempts=1)
    server.behave = lambda prompt, before: GOOD
    judged(server, [runs / "none"], bench, out)
    runs_of, _ = collect([out])
    by_pivot = {run.identity.cell.pivot.intact: run.scores["mt_bench"] for run in runs_of}
    assert (len(by_pivot[True].values), len(by_pivot[False].values)) == (4, 5)
    assert "documents (4, 5)" in markdown(runs_of).split("Not compared with a baseline:")[1]


def test_answers_to_other_questions_are_refused(server, runs, bench, tmp_path):
    file = bench / "mt_bench" / "question.jsonl"
    file.write_text(file.read_text().replace("First 1?", "Another?"))
    with pytest.raises(DataError, match="answers to other questions"):
        judged(server, [runs / "none"], bench, tmp_path / "out")
    assert not server.asked


def test_answers_go_out_and_come_back(runs, tmp_path):
    paths = export_answers([runs / "intact", runs / "none"], tmp_path / "model_answer", "mt_bench")
    assert [path.stem for path in paths] == ["llama_rtn-w3g32_pivot-bos_seed42", "llama_rtn-w3g32_pivot-none_seed42"]
    logged = [json.loads(line) for line in next((runs / "intact").rglob("samples_*")).read_text().splitlines()]
    found = read_answers(paths[0])
    assert [list(found[one["doc"]["question_id"]].choices[0].turns) for one in logged] == [
        [turn[0] for turn in one["resps"][0][0]] for one in logged
    ]
    row = json.loads(paths[0].read_text().splitlines()[0])
    assert row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    with pytest.raises(DataError, match="have this name"):
        export_answers([runs / "none", runs / "none"], tmp_path, "mt_bench")
    with pytest.raises(DataError, match="no run of vicuna_bench"):
        export_answers([runs], tmp_path, "vicuna_bench")


@pytest.mark.parametrize("seed", ["/../../escaped", "/absolute", "..", "a\x00b", 10**300])
def test_answers_stay_in_their_folder(runs, tmp_path, seed):
    edit(runs / "intact", lambda content: content["configs"]["mt_bench"]["metadata"].update(seed=seed))
    (path,) = export_answers([runs / "intact"], tmp_path / "deep" / "out", "mt_bench")
    assert path.parent == tmp_path / "deep" / "out"
    assert list((tmp_path / "deep" / "out").iterdir()) == [path]
    assert [one.name for one in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content["configs"]["mt_bench"].update(metadata=["x"]),
        lambda content: content.update(configs=[]),
        lambda content: content.pop("n-samples"),
        lambda content: content.update({"n-samples": {"mt_bench": 5}}),
    ],
)
def test_a_damaged_run_is_refused_before_anything_is_paid(server, runs, bench, tmp_path, damage):
    edit(runs / "intact", damage)
    with pytest.raises(IntactKVError, match="not a whole results file"):
        judged(server, [runs / "intact"], bench, tmp_path / "out")
    assert not server.asked


def test_two_judges_keep_their_scores_in_one_folder(server, runs, bench, tmp_path):
    judged(server, [runs / "intact"], bench, tmp_path / "out")
    first = collect([tmp_path / "out"])[0]
    judged(server, [runs / "intact"], bench, tmp_path / "out", model="other/judge", references="gpt-4")
    both, _ = collect([tmp_path / "out"])
    said = [run.scores["mt_bench"].settings["protocol"] for run in both]
    assert sorted(said) == [
        "mt_bench judged by judge, references of judge",
        "mt_bench judged by other/judge, references of gpt-4",
    ]
    assert [run.path for run in first] == [run.path for run in both if "other" not in str(run.path)]


def test_scores_of_answers_that_are_no_more_go(server, runs, bench, tmp_path):
    out = tmp_path / "out"
    judged(server, [runs / "intact"], bench, out)
    assert len(list(out.rglob("results_*.json"))) == len(list(out.rglob("samples_*.jsonl"))) == 1
    samples = next((runs / "intact").rglob("samples_*"))
    changed = [json.loads(line) for line in samples.read_text().splitlines()]
    for row in changed:
        row["resps"][0][0][0][0] += " changed"
    samples.write_text("".join(json.dumps(row) + "\n" for row in changed))
    server.behave = lambda prompt, before: (200, json.dumps(completion("none")))
    judged(server, [runs / "intact"], bench, out, attempts=1)
    assert not list(out.rglob("results_*.json")) + list(out.rglob("samples_*.jsonl"))


def edit(folder, change):
    path = next(folder.rglob("results_*.json"))
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_rating_of_is_not_constant():
    assert len({rating_of(str(i)) for i in range(50)}) == 10
