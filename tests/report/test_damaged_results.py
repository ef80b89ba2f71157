"""Results files that are damaged, or were made to be: named, or shown for what they are."""

import csv
import io
import json
import re

import pytest
from test_report import BOS, write

from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import collect, read_run
from intactkv_eval.report.page import page
from intactkv_eval.report.planned import absent_of
from intactkv_eval.report.tables import as_json, comma_separated, latex, markdown


def test_a_group_that_names_itself(tmp_path):
    path = write(tmp_path, BOS, [3.0, 3.2], 1)
    content = json.loads(path.read_text())
    content["group_subtasks"] = {"ppl_x": ["ppl_x"], "a": ["b"], "b": ["a", "ppl_x"]}
    path.write_text(json.dumps(content))
    assert list(read_run(path).scores) == ["ppl_x"]


@pytest.mark.parametrize("figure", [float("nan"), float("inf"), 1e308])
def test_seeds_of_which_one_is_no_number(tmp_path, figure):
    """No mean and no spread are made of it, and the table is still written."""
    for seed in (1, 2):
        path = write(tmp_path, BOS, [3.0, 3.2], seed, samples=False)
        content = json.loads(path.read_text())
        content["configs"]["ppl_x"]["metadata"]["seed"] = seed
        content["results"]["ppl_x"] = {"acc,none": 0.5 if seed == 1 else figure, "acc_stderr,none": 0.1}
        path.write_text(json.dumps(content))
    runs, _ = collect([tmp_path])
    assert "nan" not in markdown(runs).lower()
    assert "inf" not in markdown(runs).lower()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"config": {"intactkv": {}}}', '{"config": {}}x', "null"])
def test_damaged_results_are_named(tmp_path, damage):
    path = tmp_path / "results_1.json"
    path.write_text(damage)
    with pytest.raises(ConfigError, match="results_1"):
        read_run(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("source_hash", ["x"]), ("awq_search", 1), ("hf_arguments", 3), ("quantization", "gptq"), ("pivot_tokens", ["x"])],
)
def test_a_record_of_other_types_is_damaged(tmp_path, key, value):
    write(tmp_path, BOS, [3.0, 3.1], 1, record={key: value})
    with pytest.raises(ConfigError, match="not a whole results file"):
        collect([tmp_path])


@pytest.mark.parametrize("number", ["Infinity", "1e999", "NaN", '"x"'])
def test_a_sample_without_a_number_is_damaged(tmp_path, number):
    write(tmp_path, BOS, [3.0, 3.1], 1)
    (tmp_path / "samples_ppl_x_1.jsonl").write_text(f'{{"doc_id": {number}, "nll": 1.0}}')
    with pytest.raises(ConfigError, match="not a whole results file"):
        collect([tmp_path])


@pytest.mark.parametrize("seed", [float("nan"), "x", [1], 0.5])
def test_the_seed_of_a_plan_is_a_number(tmp_path, seed):
    unit = {"format": RECORD_FORMAT, "key": "a", "task": "ppl_x", "seed": seed, "cell": {}}
    (tmp_path / "sweep.json").write_text(json.dumps([unit]))
    with pytest.raises(ConfigError, match="the seed"):
        absent_of([tmp_path])


def test_names_are_texts_in_every_table(tmp_path):
    names = ["a\n\n# Title", "a\\|b", "<img src=x>", "[click](javascript:x)", "a\rb", "=1+1", "@SUM(1)", "[BOS]x", "*x",
             "＝1+1", "＋1", "－1", "＠SUM(1)", " =1+1", "\u200e=1+1", "\x1b[31mred", "up\u202eside", "http://user:pw@host/m"]  # fmt: skip
    for date, name in enumerate(names, 1):
        write(tmp_path, {**BOS, "pretrained": name}, [3.0, 3.1], date)
    runs, _ = collect([tmp_path])
    table, _, rest = markdown(runs).partition("\n\n")
    assert len(table.splitlines()) == 2 + len(names)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in table.splitlines()} == {9}
    assert "# Title" not in [line.strip() for line in rest.splitlines()]
    for markup in ("<img", "](javascript"):
        assert not re.search(r"(?<!\\)" + re.escape(markup), markdown(runs))
    rows = [row for row in csv.DictReader(io.StringIO(comma_separated(runs))) if row["status"] == "done"]
    assert len(rows) == len(names)
    assert not [row for row in rows if row["model"].strip().startswith(tuple("=+-@＝＋－＠"))]
    for made in (markdown, comma_separated, latex, as_json, page):
        assert not re.search("[\x1b\u202e\u200e]|user:pw", made(runs).replace("\\u202e", "\u202e")), made
    lines = latex(runs).splitlines()
    assert len(lines) == 8 + len(names)
    assert not [line for line in lines if line.startswith(("[", "*"))]
