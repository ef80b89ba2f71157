"""Figures of two revisions of a formula are never paired, and old ones are named stale in every form of the report."""

import json

import pytest
from test_report import BOS, FP, NONE, write

from intactkv_eval.cell import formulas
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.page import page
from intactkv_eval.report.tables import as_json, markdown

KV = {"kv_bits": 4}
OLD = {"formulas": {}}
LOSSES = [3.5, 3.72, 3.6, 3.41] * 3
BETTER = [3.25, 3.46, 3.34, 3.15] * 3


def runs_of(folder):
    return collect([folder])[0]


def compared(folder):
    """The comparison of the intact run."""
    runs = runs_of(folder)
    return compare(next(run for run in runs if run.identity.cell.pivot.intact), "ppl_x", runs)


@pytest.mark.parametrize("old", ["baseline", "intact"])
def test_two_revisions_are_not_paired(tmp_path, old):
    write(tmp_path, {**NONE, **KV}, LOSSES, 1, record=OLD if old == "baseline" else None)
    write(tmp_path, {**BOS, **KV}, BETTER, 2, record=OLD if old == "intact" else None)
    assert compared(tmp_path).to_baseline is None
    assert "formula revision.kv.token_head" in markdown(runs_of(tmp_path))


def test_one_old_revision_is_paired_with_itself(tmp_path):
    """A control: two runs without revisions are of the same one."""
    for cell, values, date in (({**NONE, **KV}, LOSSES, 1), ({**BOS, **KV}, BETTER, 2)):
        write(tmp_path, cell, values, date, record=OLD)
    assert compared(tmp_path).to_baseline is not None


def test_old_runs_whose_formulas_have_not_changed_are_as_good_as_new_ones(tmp_path):
    write(tmp_path, FP, [3.0, 3.2, 3.1, 2.9] * 3, 1, record=OLD)
    write(tmp_path, NONE, LOSSES, 2, record=OLD)
    write(tmp_path, BOS, BETTER, 3)
    found = compared(tmp_path)
    assert found.to_baseline is not None
    assert found.to_full_precision is not None
    assert "tale" not in markdown(runs_of(tmp_path))


def test_the_newest_of_two_revisions_does_not_hide_the_other(tmp_path):
    write(tmp_path, {**NONE, **KV}, LOSSES, 1, record=OLD)
    write(tmp_path, {**NONE, **KV}, BETTER, 2)
    assert len(grid_of(runs_of(tmp_path)).rows) == 2


def test_stale_figures_are_named_everywhere(tmp_path):
    write(tmp_path, {**NONE, **KV}, LOSSES, 1, record=OLD)
    write(tmp_path, NONE, LOSSES, 2, record=OLD)
    runs = runs_of(tmp_path)
    now = formulas.REVISIONS["kv.token_head"]
    line = f"m, rtn w4g64 [stale], 4 token_head, none: kv.token_head of revision 1, now {now}"
    assert grid_of(runs).stale == [line]
    assert f"- {line}" in markdown(runs)
    assert line in page(runs)
    found = {one["kv"]: one["stale"] for one in json.loads(as_json(runs))}
    assert found == {"16": [], "4 token_head": [f"kv.token_head of revision 1, now {now}"]}


def test_a_checkpoint_says_by_which_revision_it_was_made(tmp_path):
    job = {"method": "gptq", "group_size": 64, "bits": 3, "symmetric": False, "options": {"static_groups": False}}
    said = {"method": "gptq", "bits": 3, "group_size": 64, "symmetric": False, "act_order": True, "mixed": False}
    for date, made in ((1, {}), (2, {"formulas": {"weights.gptq": 2, "weights.gptq.small_groups": 2}})):
        quantization = {**said, "made": {"job": job, **made}}
        write(tmp_path, FP, LOSSES, date, record={"quantization": quantization, "source_hash": f"{date}"})
    old, new = runs_of(tmp_path)
    assert old.identity.stale == [
        f"{name} of revision 1, now 2" for name in ("weights.gptq", "weights.gptq.small_groups")
    ]
    assert new.identity.stale == []


@pytest.mark.parametrize("wrong", ["2", 2.5, [2], {"a": 1}])
def test_a_damaged_revision_is_a_damaged_file(tmp_path, wrong):
    write(tmp_path, {**NONE, **KV}, LOSSES, 1, record={"formulas": {"kv.token_head": wrong}})
    with pytest.raises(ConfigError, match="revision"):
        collect([tmp_path])


@pytest.mark.parametrize("recorded", [{}, {"calibration.vicuna": 2}])
def test_a_pivot_that_was_trained_is_paired_with_its_baseline_whenever_it_was(tmp_path, recorded):
    """The baseline has no trained rows, so their revision is none of its own; it is named all the same."""
    vicuna = {"chat_template": "vicuna_v1.1"}
    fingerprint = {"weight_hash": "w", "basis": "plain", "calibrated": {"quantized": "q"}}
    write(tmp_path, {**NONE, **vicuna}, LOSSES, 1)
    write(tmp_path, {**BOS, **vicuna}, BETTER, 2, record={"pivot_fingerprint": fingerprint, "formulas": recorded})
    found = compared(tmp_path)
    assert found.to_baseline is not None
    stale = [run.identity.stale for run in runs_of(tmp_path)]
    assert stale == [[], [] if recorded else ["calibration.vicuna of revision 1, now 2"]]
