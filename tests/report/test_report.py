"""The table: pairing, recovery, uncertainty."""

import json
import os
from math import exp

import numpy as np
import pytest

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.formulas import formulas_of
from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect, read_run
from intactkv_eval.report.compare import compare
from intactkv_eval.report.tables import markdown

FP = {"pretrained": "m", "pivot": "none"}
NONE = {"pretrained": "m", "weights": "rtn", "bits": 4, "group_size": 64, "pivot": "none"}
BOS = {**NONE, "pivot": "bos"}


def write(folder, cell, values, date, task="ppl_x", model="intactkv", samples=True, record=None, **settings):
    """A results file as lm_eval 0.4.13 writes it, with one perplexity task of these window nlls."""
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)) ** 0.5
    figures = {
        "alias": task,
        "nll,none": mean,
        "nll_stderr,none": spread,
        "perplexity,none": exp(mean),
        "perplexity_stderr,none": "N/A",
    }
    record = {
        "pivot_tokens": [1],
        "formulas": formulas_of(cell_from_args(cell)),
        **(record or {}),
        "cell": cell_from_args(cell).model_dump(mode="json"),
        "dtype": "float32",
        "versions": {"lm_eval": "0.4.13"},
    }
    content = {
        "results": {task: figures},
        "group_subtasks": {task: []},
        "higher_is_better": {task: {"nll": False, "perplexity": False}},
        "configs": {task: {"metadata": {"protocol": "bos-window-2048"}}},
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "config": {"model": model, "limit": None, **settings}
        | ({"intactkv": {"format": RECORD_FORMAT, **record}} if model == "intactkv" else {}),
        "date": date,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"results_{date}.json"
    path.write_text(json.dumps(content))
    if samples:
        rows = [json.dumps({"doc_id": i, "nll": v, "perplexity": v}) for i, v in enumerate(values)]
        (folder / f"samples_{task}_{date}.jsonl").write_text("\n".join(rows))
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, FP, [3.0, 3.2, 3.1, 2.9] * 6, 1)
    write(tmp_path, NONE, [3.5, 3.72, 3.6, 3.41] * 6, 2)
    write(tmp_path, BOS, [3.25, 3.46, 3.34, 3.15] * 6, 3)
    return tmp_path


def test_recovered_is_the_share_of_the_loss_given_back(folder):
    runs, _ = collect([folder])
    found = compare(runs[2], "ppl_x", runs)
    full, none, bos = exp(3.05), exp(3.5575), exp(3.3)
    assert found.to_baseline.value == pytest.approx(bos - none)
    assert found.to_full_precision.value == pytest.approx(bos - full)
    assert found.share.value == pytest.approx((3.5575 - 3.3) / (3.5575 - 3.05)), "of log-likelihoods"
    assert found.is_loss


def test_pairing_makes_the_uncertainty_small(folder):
    """The windows differ far more from each other than one window does between cells."""
    runs, _ = collect([folder])
    paired = compare(runs[2], "ppl_x", runs).to_baseline.stderr
    for file in folder.glob("samples_*"):
        file.unlink()
    runs, _ = collect([folder])
    unpaired = compare(runs[2], "ppl_x", runs).to_baseline.stderr
    assert paired < unpaired / 5


def test_paired_stderr_of_a_perplexity_is_its_first_order_change(tmp_path):
    """Of exp of the log-likelihoods' difference, in blocks of windows: a plain one where windows are independent."""
    rng = np.random.default_rng(0)
    shared = rng.normal(3.0, 0.3, 1000)
    change = rng.normal(-0.2, 0.05, 1000)
    write(tmp_path, NONE, list(shared), 1)
    write(tmp_path, BOS, list(shared + change), 2)
    runs, _ = collect([tmp_path])
    found = compare(runs[1], "ppl_x", runs).to_baseline
    assert found.stderr == pytest.approx(np.exp((shared + change).mean()) * 0.05 / 1000**0.5, rel=0.15)
    assert found.test.stderr == pytest.approx(0.05 / 1000**0.5, rel=0.15)


@pytest.mark.parametrize(
    "change", [{"bits": 3}, {"group_size": 32}, {"kv_bits": 4}, {"pretrained": "other"}, {"symmetric": True}]
)
def test_another_cells_baseline_is_not_used(folder, change):
    write(folder, {**BOS, **change}, [3.2, 3.3, 3.4, 3.1] * 6, 4)
    runs, _ = collect([folder])
    assert compare(runs[3], "ppl_x", runs).to_baseline is None


def test_symmetric_weights_by_another_formula_are_another_model(tmp_path):
    """A run that names no formula is of the time when all were GPTQ's: no baseline for one by QuaRot's, nor its row."""
    rotated = {**BOS, "symmetric": True, "rotate": True}
    baseline = {**rotated, "pivot": "none"}
    write(tmp_path, baseline, [3.5, 3.72, 3.6, 3.41] * 6, 1)
    write(tmp_path, rotated, [3.2, 3.3, 3.4, 3.1] * 6, 2, record={"symmetric_formula": "quarot"})
    runs, _ = collect([tmp_path])
    assert compare(runs[1], "ppl_x", runs).to_baseline is None
    table = markdown(runs)
    assert "| rtn w4g64 sym rotated |" in table
    assert "| rtn w4g64 sym-quarot rotated |" in table
    assert "symmetric formula (quarot, gptq)" in table
    write(tmp_path, baseline, [3.5, 3.72, 3.6, 3.41] * 6, 3, record={"symmetric_formula": "quarot"})
    runs, _ = collect([tmp_path])
    assert compare(runs[1], "ppl_x", runs).to_baseline is not None


def test_another_limit_is_another_measurement(folder):
    write(folder, BOS, [3.2, 3.3], 4, limit=2.0)
    runs, _ = collect([folder])
    assert compare(runs[3], "ppl_x", runs).to_baseline is None
    assert compare(runs[2], "ppl_x", runs).share is not None
    header, _, *rows = markdown(runs).splitlines()[:5]
    assert "(bos-window-2048)" in header
    assert "(bos-window-2048, limit 2)" in header
    assert [row.split(" | ")[8].startswith(f"{exp(3.25):.4f}") for row in rows] == [False, False, True]


@pytest.mark.parametrize(
    "change", [{"source_hash": "other"}, {"hf_arguments": {"gguf_file": "b"}}, {"quantization": {"method": "fp8"}}]
)
def test_another_model_in_the_same_place_is_another_row(folder, change):
    write(folder, BOS, [3.2, 3.3, 3.4, 3.1] * 6, 4, record=change)
    runs, _ = collect([folder])
    assert compare(runs[3], "ppl_x", runs).to_baseline is None
    assert sum(line.startswith("| m") for line in markdown(runs).splitlines()) == 5


def test_how_fast_it_ran_is_no_identity(folder):
    write(folder, BOS, [3.2, 3.3, 3.4, 3.1] * 6, 4, record={"hf_arguments": {"batch_size": "8", "device": "cpu"}})
    runs, _ = collect([folder])
    delta = compare(runs[3], "ppl_x", runs).to_baseline
    assert delta.value == pytest.approx(runs[3].scores["ppl_x"].value - runs[1].scores["ppl_x"].value)
    assert abs(delta.value) > 1


def test_a_quantized_checkpoint_is_compared_with_its_reference(tmp_path):
    made = {"pretrained": "m-gptq", "reference": "m", "pivot": "bos"}
    write(tmp_path, {"pretrained": "m", "pivot": "none"}, [3.0, 3.2, 3.1, 2.9] * 6, 1, record={"source_hash": "a"})
    quantized = {
        "source_hash": "b",
        "quantization": {
            "method": "gptq",
            "bits": 4,
            "group_size": 128,
            "symmetric": True,
            "act_order": True,
            "mixed": False,
        },
    }
    write(tmp_path, {"pretrained": "m-gptq", "pivot": "none"}, [3.5, 3.72, 3.6, 3.41] * 6, 2, record=quantized)
    write(tmp_path, made, [3.25, 3.46, 3.34, 3.15] * 6, 3, record=quantized)
    runs, _ = collect([tmp_path])
    assert compare(runs[2], "ppl_x", runs).share.value == pytest.approx((3.5575 - 3.3) / (3.5575 - 3.05))
    assert "gptq w4g128 sym act-order" in markdown(runs)
    quantized["quantization"]["made"] = {"job": {"method": "awq", "calibration": {"pivot": {"source": "bos"}}}}
    write(tmp_path, made, [3.25, 3.46, 3.34, 3.15] * 6, 3, record=quantized)
    assert "awq w4g128 sym act-order calibrated behind bos" in markdown(collect([tmp_path])[0])


def test_an_exact_pairing_says_so(folder):
    """The control: equal on every document is a difference of 0 with an error of 0, not the spread of the documents."""
    write(folder, {**FP, "pivot": "bos"}, [3.0, 3.2, 3.1, 2.9] * 6, 4)
    assert "+0.0000 ± 0.0000" in markdown(collect([folder])[0])


def test_lm_evals_own_perplexity_is_not_paired_as_ours(tmp_path):
    """lambada logs log-likelihoods under the name perplexity; its accuracy is the figure anyway."""
    for date, cell in ((1, NONE), (2, BOS)):
        path = write(tmp_path, cell, [3.0, 3.2], date)
        content = json.loads(path.read_text())
        content["results"]["ppl_x"] = {"perplexity,none": 20.0, "perplexity_stderr,none": 2.0}
        path.write_text(json.dumps(content))
    runs, _ = collect([tmp_path])
    assert compare(runs[1], "ppl_x", runs).to_baseline.stderr == pytest.approx(8**0.5)
    content["results"]["ppl_x"] = {"perplexity,none": 20.0, "acc,none": 0.5, "acc_stderr,none": 0.1}
    path.write_text(json.dumps(content))
    assert read_run(path).scores["ppl_x"].metric == "acc"


def test_groups_or_their_leaves(tmp_path):
    path = write(tmp_path, BOS, [3.0, 3.2], 1)
    content = json.loads(path.read_text())
    content["results"]["group"] = {"acc,none": 0.5, "acc_stderr,none": 0.1}
    content["group_subtasks"] = {"group": ["ppl_x"]}
    path.write_text(json.dumps(content))
    assert list(read_run(path).scores) == ["group"]
    assert list(read_run(path, leaves=True).scores) == ["ppl_x"]


def test_the_newest_run_of_a_cell_counts(folder):
    write(folder, BOS, [3.0, 3.2, 3.1, 2.9] * 6, 9)
    runs, _ = collect([folder])
    assert compare(runs[2], "ppl_x", runs).score.value == pytest.approx(exp(3.3))
    assert f"{exp(3.05):.4f}" in next(line for line in markdown(runs).splitlines() if "| bos |" in line)


def test_table(folder):
    runs, _ = collect([folder])
    lines = markdown(runs).splitlines()
    assert lines[0].startswith(
        "| model | weights | kv | pivot | ppl_x perplexity↓ (bos-window-2048) | Δ base | Δ fp | recovered |"
    )
    assert [line.split(" | ")[1:4] for line in lines[2:5]] == [
        ["fp", "16", "none"],
        ["rtn w4g64", "16", "none"],
        ["rtn w4g64", "16", "bos"],
    ]
    assert f"| {100 * (3.5575 - 3.3) / (3.5575 - 3.05):.1f}% [" in lines[4]
    assert markdown(runs) == markdown(collect([folder])[0])


def test_other_models_are_counted_and_left_out(folder):
    write(folder, FP, [3.0, 3.1], 8, model="hf")
    runs, foreign = collect([folder])
    assert (len(runs), foreign) == (3, 1)


def test_nothing_to_report(tmp_path):
    with pytest.raises(ConfigError, match="no such"):
        collect([tmp_path / "none"])
    with pytest.raises(ConfigError, match="holds no"):
        collect([tmp_path])
    write(tmp_path, FP, [3.0, 3.1], 8, model="hf")
    with pytest.raises(ConfigError, match="no run"):
        markdown(collect([tmp_path])[0])


@pytest.mark.parametrize(("windows", "has_error"), [(7, False), (8, True)])
def test_few_windows_have_no_error(tmp_path, windows, has_error):
    """lm_eval writes one of two windows too."""
    values = list(np.random.default_rng(0).normal(3.0, 0.3, windows))
    assert (read_run(write(tmp_path, FP, values, 1)).scores["ppl_x"].stderr is not None) == has_error
    assert ("±" in markdown(collect([tmp_path])[0]).splitlines()[2]) == has_error


def test_stderr_of_a_perplexity_comes_from_its_nll(tmp_path):
    values = np.random.default_rng(0).normal(3.0, 0.3, 1000)
    score = read_run(write(tmp_path, FP, list(values), 1)).scores["ppl_x"]
    assert score.value == pytest.approx(exp(values.mean()))
    assert score.stderr == pytest.approx(score.value * 0.3 / 1000**0.5, rel=0.15)


def test_kv_cells_find_their_baseline(tmp_path):
    """A cell and its baseline have a file of levels each; the switch of intact rows is no baseline's."""
    kv = {"pretrained": "m", "kv_bits": 3}
    levels = {"fingerprint": {"weight_hash": "w"}, "samples": "s"}
    pre_rope, groups = {**kv, "kv_scheme": "pre_rope"}, {**kv, "kv_scheme": "channel_key"}
    cells = [
        ({**pre_rope, "kv_codebook": "a.safetensors", "pivot": "none"}, {"kv_codebook": levels}),
        ({**pre_rope, "kv_codebook": "b.safetensors"}, {"kv_codebook": levels}),
        ({**pre_rope, "kv_codebook": "b.safetensors"}, {"kv_codebook": {**levels, "samples": "others"}}),
        ({**groups, "pivot": "none"}, None),
        ({**groups, "kv_quantize_pivot": True}, None),
    ]
    for date, (cell, record) in enumerate(cells, 1):
        write(tmp_path, cell, [3.0 + date, 3.2 + date, 3.1 + date], date, record=record)
    runs, _ = collect([tmp_path])
    paired = [compare(run, "ppl_x", runs).to_baseline is not None for run in runs]
    assert paired == [False, True, False, False, True]
    assert "| 3 channel_key g32 residual 128 pivot too |" in markdown(runs)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["results_2026-01-01.json", "sweep.json"])
def test_results_that_never_end(tmp_path, kind, name):
    """A pipe in a folder of results waited for ever, and a link to /dev/zero filled the memory."""
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=f"is a {kind}, or a link to one|holds no results"):
        collect([tmp_path])
