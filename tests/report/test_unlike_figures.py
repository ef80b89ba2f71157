"""What looks alike and is not: samples of another run, other filters, examples, pivots; none of it is compared."""

import csv
import io
import json

import pytest
from test_report import BOS, FP, NONE, write

from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect, read_run
from intactkv_eval.report.compare import compare
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.tables import as_json, comma_separated, markdown

LONG = [3.0, 3.2, 3.1, 2.9, 3.3, 3.0, 3.1, 2.8, 3.2, 3.1]


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def accuracy(folder, cell, correct, date, figure=None, **more):
    """A run of one accuracy task."""
    path = write(folder, cell, [1.0, 2.0], date, samples=False)
    value = sum(correct) / len(correct) if figure is None else figure
    edit(path, lambda content: content.update(results={"ppl_x": {"acc,none": value, "acc_stderr,none": 0.1}}, **more))
    rows = [json.dumps({"doc_id": place, "acc": value, "filter": "none"}) for place, value in enumerate(correct)]
    (folder / f"samples_ppl_x_{date}.jsonl").write_text("\n".join(rows))
    return path


def to_baseline(folder):
    runs, _ = collect([folder])
    return compare(runs[-1], "ppl_x", runs).to_baseline


@pytest.mark.parametrize("kept", [LONG[:5], [value + 1 for value in LONG]], ids=["cut", "another run's"])
def test_samples_that_do_not_make_up_the_figure_are_not_paired(tmp_path, kept):
    write(tmp_path, NONE, [value + 0.1 for value in LONG], 1)
    write(tmp_path, BOS, LONG, 2)
    assert to_baseline(tmp_path).test is not None
    for date in (1, 2):
        rows = [json.dumps({"doc_id": place, "nll": value}) for place, value in enumerate(kept)]
        (tmp_path / f"samples_ppl_x_{date}.jsonl").write_text("\n".join(rows))
    assert to_baseline(tmp_path).test is None


def test_a_figure_that_is_no_mean_is_not_paired(tmp_path):
    for date, cell in enumerate((NONE, BOS), 1):
        accuracy(tmp_path, cell, [1.0] * 9 + [0.0] * 11, date, figure=0.0)
    assert to_baseline(tmp_path).test is None


@pytest.mark.parametrize("ids", [[0, 1, 1], [0, 1.5, 2], ["0", "1", "2"]])
def test_documents_have_one_number_each(tmp_path, ids):
    write(tmp_path, BOS, [3.0, 3.1, 3.2], 1)
    rows = [json.dumps({"doc_id": place, "nll": 3.1}) for place in ids]
    (tmp_path / "samples_ppl_x_1.jsonl").write_text("\n".join(rows))
    with pytest.raises(ConfigError, match="doc_id"):
        collect([tmp_path])


def test_each_filter_has_its_own_column(tmp_path):
    """gsm8k's answers are read strictly and flexibly."""
    strict, flexible = [0.0] * 9 + [1.0], [1.0] * 9 + [0.0]
    for date, (cell, read) in enumerate(((NONE, strict), (BOS, [1.0] * 6 + [0.0] * 4)), 1):
        path = accuracy(tmp_path, cell, read, date)
        figures = {"alias": "gsm8k"}
        for name, values in (("strict-match", read), ("flexible-extract", flexible)):
            figures |= {f"exact_match,{name}": sum(values) / 10, f"exact_match_stderr,{name}": 0.1}
        edit(path, lambda content, figures=figures: content["results"].update(ppl_x=figures))
        rows = [{"doc_id": place, "exact_match": value, "filter": name}
                for name, values in (("strict-match", read), ("flexible-extract", flexible))
                for place, value in enumerate(values)]  # fmt: skip
        (tmp_path / f"samples_ppl_x_{date}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    runs, _ = collect([tmp_path])
    named = {"ppl_x [strict-match]": 0.5, "ppl_x [flexible-extract]": 0.0}
    assert list(runs[0].scores) == list(named)
    for task, change in named.items():
        delta = compare(runs[1], task, runs).to_baseline
        assert delta.value == pytest.approx(change)
        assert delta.test.units == 10
    assert all(f"{task} exact_match↑" in markdown(runs) for task in named)


def test_lm_evals_bypass_is_no_figure(tmp_path):
    path = accuracy(tmp_path, BOS, [1.0], 1)
    edit(path, lambda content: content.update(results={"ppl_x": {"bypass,none": 999, "bypass_stderr,none": "N/A"}}))
    assert not read_run(path).scores


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content["config"].update(fewshot_seed=2), "seed of the few-shot examples (2, 1)"),
        (lambda content: content["configs"]["ppl_x"]["metadata"].update(max_prompt_tokens=256), "max_prompt_tokens"),
        (lambda content: content["configs"]["ppl_x"]["metadata"].update(num_choices=4), "num_choices"),
        (lambda content: content["n-samples"]["ppl_x"].update(effective=9), "documents (9, 10)"),
    ],
)
def test_other_prompts_are_not_compared_though_nothing_was_logged(tmp_path, change, named):
    said = {"n-shot": {"ppl_x": 3}, "n-samples": {"ppl_x": {"original": 10, "effective": 10}}}
    paths = [accuracy(tmp_path, cell, [1.0, date - 1.0], date, **said) for date, cell in enumerate((NONE, BOS), 1)]
    for path in paths:
        path.with_name(f"samples_ppl_x_{path.stem[-1]}.jsonl").unlink()
        edit(path, lambda content: content["config"].update(fewshot_seed=1))
    assert to_baseline(tmp_path).value == 0.5
    edit(paths[1], change)
    assert to_baseline(tmp_path) is None
    assert named in markdown(collect([tmp_path])[0]).split("Not compared with a baseline:")[1]


def test_examples_of_another_seed_are_the_same_where_the_prompts_are(tmp_path):
    said = {"n-shot": {"ppl_x": 3}, "task_hashes": {"ppl_x": "a"}}
    for date, cell in enumerate((NONE, BOS), 1):
        path = accuracy(tmp_path, cell, [1.0, float(date == 2)], date, **said)
        edit(path, lambda content, date=date: content["config"].update(fewshot_seed=date))
    assert to_baseline(tmp_path).value == 0.5


def test_a_pivot_that_was_made_anew_is_another_row(tmp_path):
    """The same file, calibrated twice: each measurement stands beside those of its own rows."""
    cell = {**NONE, "pivot": "p/cal.safetensors"}
    prints = [{"weight_hash": "w", "basis": "plain", "calibrated": {"data": data}} for data in ("a", "b")]
    for date, (task, seen) in enumerate(zip(("ppl_x", "ppl_y"), prints, strict=True), 1):
        write(tmp_path, cell, LONG, date, task=task, record={"pivot_fingerprint": seen})
    assert [len(row.entries) for row in grid_of(collect([tmp_path])[0]).rows] == [1, 1]
    write(tmp_path, {**cell, "pivot": "other/cal.safetensors"}, LONG, 3, record={"pivot_fingerprint": prints[0]})
    write(tmp_path, {**NONE, "pivot": "auto"}, LONG, 4, record={"pivot_tokens": [1]})
    write(tmp_path, {**NONE, "pivot": "auto"}, LONG, 5, record={"pivot_tokens": [1, 216]})
    rows = grid_of(collect([tmp_path])[0]).rows
    assert len({row.labels for row in rows}) == len(rows) == 5
    assert {row.labels[3] for row in rows} >= {"auto [1]", "auto [1 216]", "cal.safetensors [other/cal.safetensors]"}


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_nothing_is_compared_with_what_is_no_number(tmp_path, which, figure):
    for date, cell in enumerate((NONE, BOS), 1):
        accuracy(tmp_path, cell, [1.0 - date / 2] * 10, date, figure=figure if date == which else None)
    runs, _ = collect([tmp_path])
    assert compare(runs[1], "ppl_x", runs).to_baseline is None
    entry = next(
        entry for row in grid_of(runs).rows if row.identity.cell.pivot.intact for entry in row.entries.values()
    )
    assert (entry.base, entry.is_significant) == (None, False)
    assert "no number" in entry.unpaired
    assert "\\*" not in markdown(runs).split("`pivot` none")[0]
    lines = [row for row in csv.DictReader(io.StringIO(comma_separated(runs))) if row["status"] != "legend"]
    listed = [*json.loads(as_json(runs)), *lines]
    assert {(one["delta_base"] or None, str(one["delta_base_significant"])) for one in listed} == {(None, "False")}


def test_an_error_that_is_no_number_is_not_known(tmp_path):
    for date, (cell, value) in enumerate(((FP, 0.9), (NONE, 0.5), (BOS, 0.7)), 1):
        path = accuracy(tmp_path, cell, [1.0], date, figure=value)
        edit(path, lambda content: content["results"]["ppl_x"].update({"acc_stderr,none": float("nan")}))
    runs, _ = collect([tmp_path])
    found = compare(runs[2], "ppl_x", runs)
    assert (found.to_baseline.stderr, found.share) == (None, None)
    for path in tmp_path.glob("results_*"):
        edit(path, lambda content: content["results"]["ppl_x"].update({"acc_stderr,none": 1e200}))
    assert "%" not in markdown(collect([tmp_path])[0]).split("`pivot` none")[0]


def test_too_few_documents_give_no_share(tmp_path):
    """Two windows that lose the same have an error of zero, and tell nothing; nor do four of a thousand answers."""
    for date, (cell, lost) in enumerate(((FP, 0.0), (NONE, 0.4), (BOS, 0.2)), 1):
        write(tmp_path / "windows", cell, [3.0 + lost, 3.2 + lost], date)
        accuracy(tmp_path / "answers", cell, [0.0] * int(10 * lost) + [1.0] * (1000 - int(10 * lost)), date)
    runs, _ = collect([tmp_path / "windows"])
    assert compare(runs[2], "ppl_x", runs).share is None
    runs, _ = collect([tmp_path / "answers"])
    assert not compare(runs[2], "ppl_x", runs).share.within().is_bounded
    assert "50.0% [any] |" in markdown(runs)


@pytest.mark.parametrize("date", [float("nan"), float("inf"), 10**400])
def test_a_date_is_a_number(tmp_path, date):
    path = write(tmp_path, BOS, LONG, 1)
    edit(path, lambda content: content.update(date=date))
    with pytest.raises(ConfigError, match="not a whole results file"):
        collect([tmp_path])


def test_a_task_inside_a_group_is_the_same_task(tmp_path):
    """lm_eval 0.5.0 names it behind its group: `ppl::ppl_x`."""
    write(tmp_path, NONE, [3.5, 3.72, 3.6, 3.41] * 3, 1, task="ppl::ppl_x")
    write(tmp_path, BOS, [3.25, 3.46, 3.34, 3.15] * 3, 2)
    runs, _ = collect([tmp_path])
    assert [list(run.scores) for run in runs] == [["ppl_x"], ["ppl_x"]]
    delta = compare(runs[1], "ppl_x", runs).to_baseline
    assert delta is not None
    assert delta.test is not None, "paired over documents"
