"""What a table says: stars and brackets agree, families are stated, and nothing beside them changes a verdict."""

import json

import numpy as np
import pytest
from test_report import BOS, FP, NONE, write

from intactkv_eval.report.collect import collect
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.tables import as_json, comma_separated, markdown

BITS = (2, 3, 4, 8)
SIZES = (32, 64, 128)


def cells(folder, effect, seed, model="m", count=10):
    """A table of `count` cells and their baselines whose intact pivots change the mean of a window by `effect`."""
    rng = np.random.default_rng(seed)
    full = rng.normal(3.0, 0.3, 40)
    write(folder, {**FP, "pretrained": model}, list(full), 1)
    write(folder, {**FP, "pretrained": model, "pivot": "bos"}, list(full + rng.normal(0, 1e-4, 40)), 2)
    for number in range(count):
        change = {"pretrained": model, "bits": BITS[number % 4], "group_size": SIZES[number // 4]}
        lost = full + 0.2 + rng.normal(0, 0.02, 40)
        write(folder, {**NONE, **change}, list(lost), 10 + 2 * number)
        write(folder, {**BOS, **change}, list(lost + effect + rng.normal(0, 0.02, 40)), 11 + 2 * number)
    return folder


def entries(*folders):
    grid = grid_of(collect(folders)[0])
    return {(*row.labels, column[0]): entry for row in grid.rows for column, entry in row.entries.items()}


def verdicts(*folders):
    """What is said of each difference, without where the runs lie."""
    return {place: (entry.base, entry.fp, entry.share) for place, entry in entries(*folders).items()}


@pytest.mark.parametrize("effect", [0.0, 0.006, 0.06])
def test_star_bracket_and_share_say_the_same(tmp_path, effect):
    found = [entry for entry in entries(cells(tmp_path, effect, 1)).values() if entry.base]
    assert len(found) == 10
    for entry in found:
        left_out = entry.base.low > 0 or entry.base.high < 0
        assert entry.is_significant == entry.base.is_real == left_out == (not entry.share.holds(0.0))
        assert entry.base.p == min(1.0, 10 * entry.found.to_baseline.test.p)
    if effect == 0.06:
        assert all(entry.is_significant for entry in found)


def test_the_family_is_said_and_stands_in_every_format(tmp_path):
    cells(tmp_path, 0.02, 1)
    runs, _ = collect([tmp_path])
    assert "differences tested together: 10 of Δ base, 20 of Δ fp" in markdown(runs)
    assert "10 of Δ base, 20 of Δ fp" in comma_separated(runs)
    records = json.loads(as_json(runs))
    assert {one["delta_base_tests"] for one in records} == {None, 10}
    assert {one["delta_fp_tests"] for one in records} == {None, 20}


def test_what_lies_beside_a_table_changes_no_verdict(tmp_path):
    own = cells(tmp_path / "own", 0.006, 1)
    before = verdicts(own)
    other = cells(tmp_path / "other", 0.02, 2, model="another")
    task = tmp_path / "task"
    for date, cell in enumerate((NONE, BOS), 1):
        write(task, cell, list(np.random.default_rng(date).normal(3, 0.3, 40)), date, task="ppl_y")
    after = verdicts(own, other, task)
    assert {place: after[place] for place in before} == before
    for file in own.glob("*_2.*"):  # the control
        file.unlink()
    without = verdicts(own)
    assert without == {place: said for place, said in before.items() if place in without}


def test_a_small_p_has_no_floor(tmp_path):
    found = next(entry for entry in entries(cells(tmp_path, 0.1, 1)).values() if entry.base)
    assert found.base.p < 1e-4 / 3


def test_the_loss_has_its_p_and_bracket(tmp_path):
    cells(tmp_path, 0.02, 1)
    line = next(line for line in markdown(collect([tmp_path])[0]).splitlines() if "| rtn w4g32 | 16 | none |" in line)
    assert line.count("[") == 1
    assert ", p " in line


@pytest.mark.slow
def test_tables_of_nothing_are_rarely_starred(tmp_path):
    """Of sixty tables of ten cells without any effect; today's bound is that of a false star anywhere in a table."""
    starred = 0
    for seed in range(60):
        folder = cells(tmp_path / str(seed), 0.0, seed)
        found = [entry for entry in entries(folder).values() if entry.base]
        starred += any(entry.is_significant or not entry.share.holds(0.0) for entry in found)
    assert starred <= 8, "3 are expected; 9 or more have a probability of 0.4%"


def test_there_is_no_share_where_nothing_was_lost(tmp_path):
    for date, (cell, level) in enumerate(((FP, 3.1), (NONE, 3.0), (BOS, 2.9))):
        write(tmp_path, cell, [level + 0.01 * (place % 3) for place in range(24)], date)
    runs, _ = collect([tmp_path])
    assert not compare(runs[2], "ppl_x", runs).is_loss
    table = markdown(runs).split("`pivot` none")[0]
    assert "%" not in table
    assert "| no loss |" in table


def test_a_loss_within_noise_has_an_open_share(tmp_path):
    """No gate chooses which shares are shown: what is not known is shown as not known."""
    rng = np.random.default_rng(0)
    full = rng.normal(3.0, 0.1, 40)
    write(tmp_path, FP, list(full), 1)
    write(tmp_path, NONE, list(full + 0.001 + rng.normal(0, 0.1, 40)), 2)
    write(tmp_path, BOS, list(full + rng.normal(0, 0.1, 40)), 3)
    runs, _ = collect([tmp_path])
    share = compare(runs[2], "ppl_x", runs).share
    assert not share.within().is_bounded
    table = markdown(runs).split("`pivot` none")[0]
    assert compare(runs[2], "ppl_x", runs).is_loss
    assert f"{100 * share.value:.1f}% [any] |" in table
    assert "\\*" not in table


def test_a_run_without_any_baseline_says_so(tmp_path):
    write(tmp_path, BOS, [3.0, 3.1], 1)
    assert "no run without an intact pivot on this task" in markdown(collect([tmp_path])[0])
