"""scripts/migrate.py: files with an earlier release's names are refused with the fix, and rewritten without another figure."""

import json
import runpy
from copy import deepcopy
from pathlib import Path

import pytest

from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.pivot.prefix_file import PrefixFile
from intactkv_eval.report.collect import collect
from intactkv_eval.report.planned import absent_of

MIGRATE = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "migrate.py"))["migrate"]
KV = {"bits": 2, "scheme": "channel_key", "keep": 3, "group": 4, "recent": 8, "levels": None, "exempt": False,
      "rotate": False, "clip": 1.0}  # fmt: skip
CELL = {
    "model": {"pretrained": "m", "revision": "main", "dtype": "auto", "reference": None},
    "weights": {"method": "rtn", "bits": 4, "group_size": 64, "symmetric": False, "search": None, "rotate": False},
    "activations": {"bits": 16, "scheme": "token", "symmetric": True, "clip": 1.0},
    "kv": KV,
    "pivot": {"source": "bos", "intact": True, "transfer": False, "chat_template": None},
    "backend": "auto",
    "share_prefix": True,
}
RECORD = {"cell": CELL, "hf_arguments": {}, "source_hash": "a", "quantization": None, "kv_levels": None,
          "pivot_tokens": [1]}  # fmt: skip
RESULTS = {
    "results": {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1}},
    "group_subtasks": {"t": []},
    "configs": {"t": {"metadata": {"version": 1.0}}},
    "versions": {"t": 1.0},
    "higher_is_better": {"t": {"acc": True}},
    "config": {
        "model": "intactkv",
        "model_args": {"pretrained": "m", "kv_bits": 2, "kv_group": 4, "kv_recent": 8, "kv_exempt": False},
        "intactkv": RECORD,
    },
    "date": 1.0,
}
PREFIX = {
    "format": "intactkv-pivots-1",
    "tokens": [1, 7],
    "text": ["<s>", "a"],
    "searched": {"model": "m", "weight_hash": "h", "dtype": "float32", "samples": {}, "threshold": 8.0, "most": 4,
                 "least": 0.2},
    "choice": {
        "prefix": [1, 7],
        "before": {"prefix": [1], "pivots": 3.0, "nats": [2.5, 2.25]},
        "after": {"prefix": [1, 7], "pivots": 1.0, "nats": [2.0, 2.125]},
        "steps": [[[1], 3.0], [[1, 7], 1.0]],
    },
}  # fmt: skip


@pytest.fixture
def old(tmp_path):
    """A folder of files as an earlier release wrote them."""
    (tmp_path / "results_2026-11-01.json").write_text(json.dumps(RESULTS))
    (tmp_path / "prefix.json").write_text(json.dumps(PREFIX))
    return tmp_path


def read(path):
    return json.loads(path.read_text())


def test_an_old_file_is_refused_with_the_fix(old):
    with pytest.raises(ConfigError, match=r"results_2026-11-01\.json.*format 'None'.*scripts/migrate\.py FOLDER"):
        collect([old])
    with pytest.raises(PivotError, match=r"prefix\.json"):
        PrefixFile.load(old / "prefix.json")
    (old / "sweep.json").write_text(json.dumps([{"key": "a", "task": "t", "seed": None, **RECORD}]))
    with pytest.raises(ConfigError, match=r"sweep\.json.*format 'None'.*scripts/migrate\.py FOLDER"):
        absent_of([old])


def test_names_are_todays_and_no_figure_is_another(old):
    (old / "sweep.json").write_text(json.dumps([{"key": "a", "task": "t", "seed": None, **RECORD}]))
    assert MIGRATE(old) == 3
    [run], _ = collect([old])
    kv = run.identity.cell.kv
    assert (kv.bits, kv.scheme, kv.sink_tokens, kv.group_size, kv.residual_length) == (2, "channel_key", 3, 4, 8)
    assert kv.quantize_pivot is True
    assert run.scores["t"].value == 0.5
    content = read(old / "results_2026-11-01.json")
    assert content["config"]["model_args"] == {
        "pretrained": "m", "kv_bits": 2, "kv_group_size": 4, "kv_residual_length": 8, "kv_quantize_pivot": True
    }  # fmt: skip
    assert content["results"] == RESULTS["results"]
    [absent] = absent_of([old])
    assert absent.record["format"] == RECORD_FORMAT
    prefix = PrefixFile.load(old / "prefix.json")
    assert (prefix.searched.max_prefix_tokens, prefix.searched.min_reduction) == (4, 0.2)
    assert (prefix.choice.before.nll, prefix.choice.after.nll) == ((2.5, 2.25), (2.0, 2.125))


def test_what_is_todays_stays_as_it_is(old):
    """A second time nothing is rewritten; settings of other things that have such names keep them."""
    other = {"text": {"rate": 3, "keep": 1, "most": 2, "exempt": True}}
    (old / "other.json").write_text(json.dumps(other))
    assert MIGRATE(old) == 2
    before = {path: path.read_bytes() for path in old.iterdir()}
    assert MIGRATE(old) == 0
    assert {path: path.read_bytes() for path in old.iterdir()} == before
    assert read(old / "other.json") == other


def test_records_of_trained_pivots(tmp_path):
    settings = {"rate": 0.002, "batch": 4, "epochs": 6, "clip": 0.3, "patience": 3, "tokens": 512, "assistant": 50,
                "master": "float32"}  # fmt: skip
    record = {
        "calibrated": {"settings": settings, "held_out": {"blocks": [2.0, 1.0], "nats": [1.5, 1.25]}, "full_nats": 1.0}
    }
    (tmp_path / "a.json").write_text(json.dumps(deepcopy(record)))
    (tmp_path / "a.csv").write_text("epoch,step,loss,held_out_blocks,held_out_last,held_out_nats\n0,0,,2.0,1.0,1.5\n")
    assert MIGRATE(tmp_path) == 2
    found = read(tmp_path / "a.json")["calibrated"]
    assert found["settings"] == {
        "learning_rate": 0.002, "batch_size": 4, "epochs": 6, "max_grad_norm": 0.3, "patience": 3, "max_tokens": 512,
        "min_assistant_tokens": 50, "param_dtype": "float32",
    }  # fmt: skip
    assert (found["held_out"], found["full_nll"]) == ({"blocks": [2.0, 1.0], "nll": [1.5, 1.25]}, 1.0)
    assert (tmp_path / "a.csv").read_text().splitlines()[1] == "0,0,,2.0,1.0,1.5"
    assert "held_out_nll" in (tmp_path / "a.csv").read_text()
