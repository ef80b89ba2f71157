"""The table's claims: what is called significant, what is not compared and why, groups of tasks, and every format."""

import csv
import io
import json
from math import exp

import numpy as np
import pytest
from test_report import BOS, FP, NONE, write

from intactkv_eval.cell.formulas import current, names_of_job
from intactkv_eval.report.collect import collect, read_run
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.page import page
from intactkv_eval.report.significance import accuracy_test
from intactkv_eval.report.tables import FORMATS, as_json, comma_separated, latex, markdown

RNG = np.random.default_rng(0)
SHARED = RNG.normal(3.0, 0.3, 40)
LOST = SHARED + 0.3 + RNG.normal(0, 0.02, 40)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, FP, list(SHARED), 1)
    write(tmp_path, NONE, list(LOST), 2)
    write(tmp_path, BOS, list(LOST - 0.05 + RNG.normal(0, 0.02, 40)), 3)
    write(tmp_path, {**FP, "pivot": "bos"}, list(SHARED + np.where(np.arange(40) % 2, 1e-3, -1e-3)), 4)
    return tmp_path


def entries(runs):
    return {row.labels[1:]: next(iter(row.entries.values())) for row in grid_of(runs).rows}


def test_a_real_difference_is_marked_and_noise_is_not(folder):
    runs, _ = collect([folder])
    found = entries(runs)
    real, control = found["rtn w4g64", "16", "bos"], found["fp", "16", "bos"]
    assert (real.is_significant, control.is_significant) == (True, False)
    assert (real.base.tests, control.base) == (1, None), "a control is not tested"
    assert real.base.low < real.found.to_baseline.value < real.base.high < 0
    assert 0 < real.share.low < real.found.share.value < real.share.high
    text = markdown(runs)
    line = next(line for line in text.splitlines() if "| rtn w4g64 | 16 | bos |" in line)
    assert f"[{real.base.low:+.4f}, {real.base.high:+.4f}]\\*" in line
    assert f"% [{100 * real.share.low:.1f}, {100 * real.share.high:.1f}] |" in line
    assert "\\*" not in next(line for line in text.splitlines() if "| fp | 16 | bos |" in line)
    assert "Not compared" not in text
    assert (
        "resampled units: blocks of 6 neighbouring windows, of 40; differences tested together: 1 of Δ base, 2 of Δ fp"
        in text
    )


def test_calibrated_behind_the_pivot_against_plainly(folder):
    """The same job on the same samples but for the pivot, measured behind the same tokens; nothing else is a partner."""

    def put(date, values, calibration, pivot="bos", **options):
        job = {"method": "gptq", "options": options, "calibration": {"data": "c4", "seed": 0, **calibration}}
        made = {"job": job, "source": {"model": "m"}, "formulas": current(names_of_job(job))}
        found = {"method": "gptq", "bits": 4, "group_size": 64, "symmetric": False, "act_order": False, "mixed": False}
        cell = {"pretrained": f"made-{date}", "pivot": pivot, **({"reference": "m"} if pivot == "bos" else {})}
        write(
            folder, cell, list(values), date, record={"source_hash": str(date), "quantization": {**found, "made": made}}
        )

    put(10, LOST, {"pivot": None})
    put(11, LOST + 1, {"pivot": None}, pivot="none")
    put(12, LOST + 2, {"pivot": None, "seed": 1})
    put(13, LOST + 3, {"pivot": None}, damp=0.1)
    put(14, LOST - 0.1 + RNG.normal(0, 0.02, 40), {"pivot": {"source": "bos"}})
    runs, _ = collect([folder])
    behind = next(run for run in runs if run.identity.behind)
    found = compare(behind, "ppl_x", runs)
    assert found.plain is next(run for run in runs if run.date == 10).scores["ppl_x"]
    assert found.to_plain.value == found.score.value - found.plain.value
    assert all(compare(run, "ppl_x", runs).plain is None for run in runs if run is not behind)
    line = markdown(runs).partition("Calibrated behind the pivot, against")[2].splitlines()[4]
    assert "| gptq w4g64 calibrated behind bos | 16 | bos |" in line
    assert f"| {found.score.value:.4f} | {found.plain.value:.4f} |" in line
    [record] = [one for one in json.loads(as_json(runs)) if one["delta_plain"] is not None]
    assert record["delta_plain_p_all"] < 0.01
    assert record["delta_plain_low"] < record["delta_plain"] < record["delta_plain_high"]


def test_another_pivot_against_bos_alone(folder):
    """Both intact, the same cell but for the tokens; its own baseline is another matter."""
    longer = {"pivot": "tokens:1+5"}
    write(folder, {**BOS, **longer}, list(LOST - 0.1 + RNG.normal(0, 0.02, 40)), 5, record={"pivot_tokens": [1, 5]})
    write(folder, {**BOS, **longer, "bits": 3}, list(LOST), 6, record={"pivot_tokens": [1, 5]})
    write(folder, {**BOS, **longer, "intact": False}, list(LOST), 7, record={"pivot_tokens": [1, 5]})
    runs, _ = collect([folder])
    compared = {run.date: compare(run, "ppl_x", runs) for run in runs}
    found = compared.pop(5)
    assert found.bos is next(run for run in runs if run.date == 3).scores["ppl_x"]
    assert found.to_bos.value == found.score.value - found.bos.value < 0
    assert all(other.bos is None for other in compared.values()), "neither [BOS] itself nor 3 bits nor a baseline"
    line = markdown(runs).partition("Other pivots against [BOS] alone")[2].splitlines()[4]
    assert f"| {found.score.value:.4f} | {found.bos.value:.4f} | {found.to_bos.value:+.4f}" in line
    [record] = [one for one in json.loads(as_json(runs)) if one["delta_bos"] is not None]
    assert record["delta_bos_p_all"] < 0.01
    assert "Δ bos: to the same cell" in page(runs)
    assert "Δ plain: to" not in page(runs)


@pytest.mark.parametrize(
    ("change", "settings", "named"),
    [
        ({"group_size": 32}, {}, "weights.group_size (32, 64)"),
        ({"bits": 3}, {}, "weights.bits (3, 4)"),
        ({"pretrained": "other"}, {}, "model.pretrained (other, m)"),
        ({"pivot": "tokens:5"}, {"pivot_tokens": [5]}, "tokens in front ([5], [1])"),
        ({}, {"versions": {"lm_eval": "0.4.14"}}, "lm_eval (0.4.14, 0.4.13)"),
        ({}, {"dtype": "bfloat16"}, "dtype (bfloat16, float32)"),
        ({}, {"source_hash": "abc"}, "weights' hash (abc, None)"),
        ({}, {"task_hashes": {"ppl_x": "new"}}, "documents or their prompts"),
        ({}, {"limit": 2.0}, "limit (2.0, None)"),
        ({}, {"protocol": "rolling"}, "protocol (rolling, bos-window-2048)"),
    ],
)
def test_an_unfit_pair_is_refused_and_the_difference_named(folder, change, settings, named):
    for file in folder.glob("*_[34].json*"):
        file.unlink()
    path = write(folder, {**BOS, **change}, list(LOST - 0.05), 5)
    for file in folder.glob("results_*"):
        content = json.loads(file.read_text())
        content["task_hashes"] = {"ppl_x": "old"}
        if file == path:
            content["config"]["intactkv"] |= {
                k: v for k, v in settings.items() if k in {"dtype", "versions", "source_hash", "pivot_tokens"}
            }
            content["config"] |= {k: v for k, v in settings.items() if k == "limit"}
            content |= {k: v for k, v in settings.items() if k == "task_hashes"}
            content["configs"]["ppl_x"]["metadata"] |= {k: v for k, v in settings.items() if k == "protocol"}
        file.write_text(json.dumps(content))
    runs, _ = collect([folder])
    assert compare(runs[-1], "ppl_x", runs).to_baseline is None
    text = markdown(runs)
    assert named in text.split("Not compared with a baseline:")[1]


def test_a_run_that_is_no_number_is_shown_as_such(folder):
    write(folder, {**BOS, "bits": 3}, [float("nan"), *LOST[1:]], 8)
    write(folder, {**NONE, "bits": 3}, list(LOST), 7)
    runs, _ = collect([folder])
    entry = entries(runs)["rtn w3g64", "16", "bos"]
    assert not entry.is_significant
    assert (entry.found.share, entry.share) == (None, None)
    assert "NaN" not in as_json(runs)
    assert page(runs)


def test_figures_of_other_documents_are_not_compared(folder):
    rows = folder / "samples_ppl_x_3.jsonl"
    rows.write_text("\n".join(line.replace('"doc_id": 0,', '"doc_id": 99,') for line in rows.read_text().splitlines()))
    runs, _ = collect([folder])
    assert compare(runs[2], "ppl_x", runs).to_baseline is None
    assert "not the same ones" in markdown(runs)


def group(folder, cell, correct, date, macro):
    """A group of accuracies over two tasks of different sizes, as lm_eval writes it."""
    tasks = {"small": correct[:20], "large": correct[20:]}
    path = write(folder, cell, [1.0, 2.0], date, samples=False)
    content = json.loads(path.read_text())
    means = [sum(part) / len(part) for part in tasks.values()]
    whole = sum(means) / 2 if macro else sum(correct) / len(correct)
    content["results"] = {
        name: {"acc,none": mean, "acc_stderr,none": 0.05} for name, mean in zip(tasks, means, strict=True)
    }
    content["results"]["group"] = {"acc,none": whole, "acc_stderr,none": 0.05}
    content["group_subtasks"] = {"group": ["small", "large"]}
    content["higher_is_better"] = {}
    path.write_text(json.dumps(content))
    for name, part in tasks.items():
        rows = [json.dumps({"doc_id": place, "acc": value}) for place, value in enumerate(part)]
        (folder / f"samples_{name}_{date}.jsonl").write_text("\n".join(rows))
    return path


@pytest.mark.parametrize("macro", [False, True])
def test_a_group_is_paired_over_the_documents_of_its_tasks(tmp_path, macro):
    correct = (RNG.random(120) < 0.5).astype(float)
    better = np.maximum(correct, (RNG.random(120) < 0.2).astype(float))
    group(tmp_path, NONE, list(correct), 1, macro)
    group(tmp_path, BOS, list(better), 2, macro)
    runs, _ = collect([tmp_path])
    found = compare(runs[1], "group", runs).to_baseline
    assert found.value == pytest.approx(runs[1].scores["group"].value - runs[0].scores["group"].value)
    if macro:
        assert found.test.method == "bootstrap-t over documents, by task"
        assert found.test.value == pytest.approx(found.value)
    else:
        assert found.test == accuracy_test(better, correct)


@pytest.mark.parametrize("changed", ["group", "large"])
def test_a_group_is_not_paired_across_versions_of_it_or_of_its_tasks(tmp_path, changed):
    """A group of the user's keeps its own version when a task in it gets another one."""
    for date, cell in enumerate((NONE, BOS), 1):
        path = group(tmp_path, cell, [1.0] * 60 + [0.0] * 60, date, macro=False)
        content = json.loads(path.read_text())
        content["versions"] = {"group": 1.0, "small": 1.0, "large": 1.0}
        path.write_text(json.dumps(content))
    assert compare(*_last(tmp_path, "group")).to_baseline.value == 0
    content["versions"][changed] = 2.0
    path.write_text(json.dumps(content))
    assert compare(*_last(tmp_path, "group")).to_baseline is None
    refused = markdown(collect([tmp_path])[0]).split("Not compared with a baseline:")[1]
    assert f"version (['group {1.0 + (changed == 'group')}', 'large {1.0 + (changed == 'large')}'" in refused


def test_two_versions_of_a_task_are_not_paired(tmp_path):
    write(tmp_path, NONE, [3.0, 3.1], 1)
    path = write(tmp_path, BOS, [3.0, 3.1], 2)
    assert compare(*_last(tmp_path, "ppl_x")).to_baseline.value == 0
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"ppl_x": 2.0}}))
    assert compare(*_last(tmp_path, "ppl_x")).to_baseline is None
    assert "version (2.0, 1.0)" in markdown(collect([tmp_path])[0]).split("Not compared with a baseline:")[1]


def _last(folder, task):
    runs, _ = collect([folder])
    return runs[-1], task, runs


def test_a_group_that_is_made_otherwise_is_not_paired(tmp_path):
    path = group(tmp_path, BOS, [1.0] * 60 + [0.0] * 60, 1, macro=False)
    content = json.loads(path.read_text())
    content["results"]["group"]["acc,none"] = 0.123
    path.write_text(json.dumps(content))
    assert not read_run(path).scores["group"].values


def test_every_format_has_the_same_figures(folder):
    runs, _ = collect([folder])
    rows = [row for row in csv.DictReader(io.StringIO(comma_separated(runs))) if row["status"] != "legend"]
    found = json.loads(as_json(runs))
    assert [row["pivot"] for row in rows] == [one["pivot"] for one in found] == ["none", "bos", "none", "bos"]
    for row, one in zip(rows, found, strict=True):
        assert float(row["value"]) == one["value"]
        assert row["delta_base"] == ("" if one["delta_base"] is None else str(one["delta_base"]))
    assert found[3]["delta_base_significant"] is True
    assert found[3]["cell"]["weights"]["bits"] == 4
    assert found[3]["value"] == pytest.approx(exp(sum(runs[2].scores["ppl_x"].values.values()) / 40))
    text = latex(runs)
    assert text.count("\\\\\n") == 5
    legend = [row for row in csv.DictReader(io.StringIO(comma_separated(runs))) if row["status"] == "legend"]
    assert "recovered: the share" in legend[0]["note"]
    assert "resampled units: blocks of 6 neighbouring windows, of 40" in legend[1]["note"]
    assert "recovered: the share" in text.partition("\\footnotesize")[2]
    assert "ppl\\_x perplexity$\\downarrow$" in text
    assert all(make(runs) == make(collect([folder])[0]) for make in FORMATS.values())


def seeded(folder, cell, values, date, seed):
    path = write(folder, cell, list(values), date)
    content = json.loads(path.read_text())
    content["configs"]["ppl_x"]["metadata"]["seed"] = seed
    path.write_text(json.dumps(content))


def test_seeds_are_averaged_with_their_spread(tmp_path):
    noise = {seed: RNG.normal(0, 0.05, 40) for seed in (42, 43, 44)}
    for date, (seed, part) in enumerate(noise.items()):
        seeded(tmp_path, NONE, LOST + part, date, seed)
        seeded(tmp_path, BOS, LOST - 0.05 + part[::-1], 10 + date, seed)
    runs, _ = collect([tmp_path])
    grid = grid_of(runs)
    assert [len(row.entries) for row in grid.rows] == [1, 1]
    entry = next(iter(grid.rows[1].entries.values()))
    figures = [exp((LOST - 0.05 + part).mean()) for part in noise.values()]
    assert entry.found.score.value == pytest.approx(np.mean(figures))
    assert entry.found.score.spread == pytest.approx(np.std(figures, ddof=1))
    assert entry.found.to_baseline.test.units == 40
    logged = [next(iter(found.scores.values())).stderr for found in runs if found.identity.cell.pivot.intact]
    assert entry.found.score.stderr == pytest.approx(np.mean(logged), rel=0.1), "of a perplexity, not of its nll"
    assert f"(spread {entry.found.score.spread:.4f})" in markdown(runs)
    for file in tmp_path.glob("*_2.json*"):
        file.unlink()
    assert "seed (42, 43, 44, 42, 43)" in markdown(collect([tmp_path])[0])


def test_drawn_answers_of_other_seeds_are_not_compared(tmp_path):
    drawn = {"gen_kwargs": {"do_sample": True, "temperature": 0.7}}
    write(tmp_path, NONE, list(LOST), 1, torch_seed=1234, **drawn)
    write(tmp_path, BOS, list(SHARED), 2, torch_seed=7, **drawn)
    assert "sampling_seed (7, 1234)" in markdown(collect([tmp_path])[0])
    write(tmp_path, BOS, list(SHARED), 3, torch_seed=1234, **drawn)
    assert "sampling_seed" not in markdown(collect([tmp_path])[0]).split("Not compared")[0].splitlines()[-1]
    greedy = tmp_path / "greedy"
    write(greedy, NONE, list(LOST), 1, torch_seed=1234)
    write(greedy, BOS, list(SHARED), 2, torch_seed=7)
    assert "Not compared" not in markdown(collect([greedy])[0])
