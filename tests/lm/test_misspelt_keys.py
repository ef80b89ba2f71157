"""A key that is misspelt is named before anything else is judged, whichever way the key comes in.

`weigths=rtn,bits=4` is not a cell in which bits does nothing; and a value that is wrong as well is none of the user's
worries until the keys are right.
"""

import re
from pathlib import Path

import pytest
import yaml

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.commands.calibrate import CalibrateOptions, calibrate_to_file
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.hf_arguments import checked_cell
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.sweep.grid import expand
from intactkv_eval.sweep.runner import Sweep
from intactkv_eval.sweep.spec import read_sweep

MODEL = "/nowhere/model"
WRONG = "unknown argument 'weigths': did you mean 'weights'"
# Each would be refused for what it says without `weights`, or for another value of it.
CELLS = {
    "idle": {"weigths": "rtn", "bits": 4},
    "behind": {"bits": 4, "group_size": 0, "weigths": "rtn"},
    "no model": {"pretrained": None, "weigths": "rtn"},
    "of hf": {"device_map": "auto", "max_length": -1, "weigths": "rtn"},
    "not taken": {"autogptq": True, "weigths": "rtn"},
    "device": {"device": "gpu", "weigths": "rtn"},
    "file": {"config": "no-such-cell", "weigths": "rtn"},
    "large": {"bits": 2**70, "weigths": "rtn"},
    "none": {"bits": 4, "weigths": None},
}
TYPED = {name: {"pretrained": MODEL, **cell} for name, cell in CELLS.items() if name not in {"no model"}}


def written(cell):
    return ",".join(f"{key}={value}" for key, value in cell.items())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_in_python(cell):
    with pytest.raises(ConfigError, match=WRONG):
        IntactKVLM(**{"pretrained": MODEL, **cell})


@pytest.mark.parametrize("cell", TYPED.values(), ids=TYPED)
def test_as_lm_eval_makes_the_model(cell):
    for made, given in ((IntactKVLM.create_from_arg_obj, cell), (IntactKVLM.create_from_arg_string, written(cell))):
        with pytest.raises(ConfigError, match=WRONG):
            made(given, {"batch_size": 1, "device": "cuda:99"})


@pytest.mark.parametrize("cell", TYPED.values(), ids=TYPED)
def test_in_a_command(cell, called):
    tasks = ["--tasks", "no_such_task", "--batch_size", "x", "--device", "gpu"]
    others = ["--out", "x.wrong", "--device", "gpu"]
    for command in (
        ["eval", *tasks],
        ["calibrate", "--data", "/nowhere", *others],
        ["figures", "--layers", "x", "--formats", "gif", *others],
    ):
        code, said = called(*command, "--model_args", written(cell))
        assert code == 2
        assert f"intactkv: {WRONG}" in said


def test_in_a_command_made_by_python():
    cell = {"pretrained": MODEL, "bits": 4}
    with pytest.raises(ConfigError, match=WRONG):
        calibrate_to_file(cell, {"weigths": "rtn"}, CalibrateOptions("/nowhere", param_dtype="x"), None, Path("out"))


def test_in_lm_evals_file(called):
    flags = {"tasks": ["no_such_task"], "batch_size": "x", "model_args": TYPED["idle"]}
    for model_args in (TYPED["idle"], written(TYPED["idle"])):
        Path("run.yaml").write_text(yaml.safe_dump({**flags, "model_args": model_args}))
        code, said = called("eval", "--config", "run.yaml")
        assert (code, WRONG in said) == (2, True)
    Path("run.yaml").write_text(yaml.safe_dump({**flags, "modle_args": {}}))
    code, said = called("eval", "--config", "run.yaml")
    assert (code, "--config run.yaml: unknown argument 'modle_args': did you mean 'model_args'" in said) == (2, True)


@pytest.mark.parametrize("beside", [{}, {"bits": 5}, {"device_map": "auto"}, {"device": "gpu"}, {"kv_codebook": "f"}])
def test_in_the_file_of_a_cell(beside):
    Path("cell.yaml").write_text("pretrained: m\nbits: 4\nweigths: rtn\nkv_bits: 99\n")
    with pytest.raises(ConfigError, match=rf"config=cell\.yaml: {WRONG}"):
        IntactKVLM(config="cell.yaml", **beside)
    with pytest.raises(ConfigError, match=rf"config=cell\.yaml: {WRONG}"):
        cell_from_args({"config": "cell.yaml"})


def test_an_argument_of_hf_in_the_file_of_a_cell():
    """Its name is right, its place is not; 'group_size' would be a poor guess."""
    Path("cell.yaml").write_text("pretrained: m\nbatch_size: 4\nbits: 4\n")
    with pytest.raises(ConfigError, match=r"batch_size is lm_eval's, not a cell's; give it beside config="):
        checked_cell({"config": "cell.yaml"}, {})


def test_a_list_of_token_ids_that_lm_eval_has_split():
    with pytest.raises(ConfigError, match=r"write pivot=tokens:1\+319\+13563"):
        IntactKVLM.create_from_arg_string("pretrained=m,pivot=tokens:1,319")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"models": [{"pretraind": "m"}]}, "models: unknown argument 'pretraind': did you mean 'pretrained'"),
        ({"models": [{"pretrained": "m", "device": "x", "trust_remote": 1}]}, "'trust_remote_code'"),
        ({"models": [{"pretrained": "m", "config": "cell.yaml"}]}, rf"models: config=cell\.yaml: {WRONG}"),
        ({"weights": [{"weigths": "rtn", "bits": 5}]}, f"weights: {WRONG}"),
        ({"weights": [{"weights": "rtn", "bits": 5}], "kv": [{"kv_bit": 4}]}, "kv: unknown argument 'kv_bit'"),
        ({"activations": [{"act_bit": 4, "act_clip": 7}]}, "did you mean 'act_bits'"),
        ({"pivots": [{"pivot": "none", "intct": True}]}, "pivots: unknown argument 'intct': did you mean 'intact'"),
        ({"seeds": list(range(9_999)), "weights": [{"weigths": "rtn"}] * 2}, f"weights: {WRONG}"),
        ({"exclude": [{"weigths": "rtn"}]}, f"exclude: {WRONG}"),
        ({"wieghts": [], "tasks": 3, "models": []}, "grid: wieghts: Extra inputs .*; did you mean 'weights'"),
        ({"tasks": [{"tsak": "x"}]}, r"grid: tasks\.0\.tsak: Extra inputs .*; did you mean 'task'.$"),
        (
            {"run": {"batch_sise": 4, "retries": -1}},
            r"grid: run\.batch_sise: Extra inputs .*; did you mean 'batch_size'.$",
        ),
        (
            {"weights": [{"quantize": {"methd": "gptq", "bits": "x"}}], "kv": [{"codebook": {"data": "c4"}}]},
            "weights: quantize: methd: Extra inputs .*; did you mean 'method'.$",
        ),
        (
            {"kv": [{"codebook": {"dta": "c4", "samples": 0}}]},
            "kv: codebook: dta: Extra inputs .*; did you mean 'data'.$",
        ),
        ({"pivots": [{"pivot": "none", "calibrate": {"epoch": 1}}]}, "pivots: calibrate: epoch: .*'epochs'.$"),
    ],
)
def test_in_a_sweep(parts, said):
    Path("cell.yaml").write_text("pretrained: m\nbits: 4\nweigths: rtn\n")
    text = yaml.safe_dump({"models": ["m"], "tasks": ["intactkv_demo_ppl"], **parts})
    with pytest.raises(ConfigError, match=said):
        expand(read_sweep(text, "grid"))


def test_in_a_sweep_before_the_names_of_its_models(tmp_path):
    Path("grid.yaml").write_text(yaml.safe_dump({"models": [{"pretraind": "m"}], "tasks": ["no_such_task"]}))
    with pytest.raises(ConfigError, match=re.escape("models: unknown argument 'pretraind'")):
        Sweep(Path("grid.yaml"), tmp_path / "out", {"m": "/elsewhere"})
