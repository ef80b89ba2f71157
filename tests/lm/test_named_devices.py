"""Every command that takes a device refuses one that is not here, before anything is loaded; none is chosen by itself."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.harness_flags import chosen_flags
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.sweep.runner import RunLocation, Sweep

MODEL = "/nowhere/model"  # whoever looks for it comes to another message
FULL = ["--model_args", f"pretrained={MODEL},weights=rtn,bits=4"]
TEXT = ["--data", "/nowhere/text.txt"]
COMMANDS = {
    "eval": ["eval", "--tasks", "intactkv_demo_ppl", *FULL],
    "eval of hf": ["eval", "--model", "hf", "--tasks", "intactkv_demo_ppl", "--model_args", f"pretrained={MODEL}"],
    "capture": ["capture", MODEL, "--out", "p.safetensors"],
    "quantize": ["quantize", MODEL, "--out", "out", "--method", "rtn", "--bits", "4"],
    "kv-codebook": ["kv-codebook", MODEL, "--out", "l.safetensors", *TEXT],
    "pivots": ["pivots", MODEL, "--data", "/nowhere/text.txt"],
    "figures": ["figures", *FULL, "--out", "figures", "--data", "/nowhere/text.txt"],
    "calibrate": ["calibrate", *FULL, "--out", "c.safetensors", *TEXT],
}


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_gpu(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def refused(called):
    """What the command says on standard error, ending with the user's exit code."""

    def call(*arguments):
        code, said = called(*arguments)
        assert code == 2, said
        return said

    return call


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("device", ["cuda:2", "gpu"])
def test_every_command_refuses_a_device_that_is_not_here(command, device, refused, tmp_path):
    said = refused(*COMMANDS[command], "--device", device)
    assert f"{device}: cannot be used here" in said
    assert "here are cpu, cuda:0, cuda:1" in said
    assert list(tmp_path.iterdir()) == []


def test_cuda_without_a_gpu(no_gpu, refused):
    """lm_eval's own hf would run on the CPU, for hours."""
    for command in COMMANDS.values():
        assert "cuda:0: cannot be used here, since PyTorch" in refused(*command, "--device", "cuda:0")


def test_among_the_arguments_of_the_model_and_in_files(refused, tmp_path):
    tasks = ["--tasks", "intactkv_demo_ppl"]
    assert "device=cuda:7: cannot" in refused("eval", *tasks, "--model_args", f"pretrained={MODEL},device=cuda:7")
    flags = {"model_args": {"pretrained": MODEL}, "tasks": ["intactkv_demo_ppl"], "device": "cuda:7"}
    Path("run.yaml").write_text(yaml.safe_dump(flags))
    assert "--device cuda:7: cannot" in refused("eval", "--config", "run.yaml")
    with pytest.raises(ConfigError, match="device=cuda:7: cannot"):
        IntactKVLM(MODEL, device="cuda:7")
    grid = {"models": [{"pretrained": MODEL, "device": "cuda:0"}], "tasks": ["intactkv_demo_ppl"]}
    Path("grid.yaml").write_text(yaml.safe_dump(grid))
    with pytest.raises(ConfigError, match=r"models: device: .*--devices"):
        Sweep(Path("grid.yaml"), tmp_path / "out", {})


@pytest.mark.parametrize("devices", ["cuda:2", "cuda:0+5", "cuda:0,cuda:1,cuda:9"])
def test_a_slot_of_a_sweep(devices, saved_llama, tmp_path):
    """Also the third of three where one cell waits, which would use the first alone."""
    Path("grid.yaml").write_text(
        yaml.safe_dump({"models": [str(saved_llama)], "pivots": ["none"], "tasks": ["intactkv_demo_ppl"]})
    )
    with pytest.raises(ConfigError, match=r"--devices cuda:.*cannot be used here.*cuda:0, cuda:1"):
        Sweep(Path("grid.yaml"), tmp_path / "out", {}).run(RunLocation(devices=devices))
    assert not list((tmp_path / "out").rglob("results_*"))


def test_kernels_bench(no_gpu):
    bench = Path(__file__).parents[2] / "kernels" / "bench.py"
    ended = subprocess.run([sys.executable, bench, "--device", "cuda:77"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--device cuda:77: cannot be used here" in ended.stderr


def test_no_device_is_a_choice_of_ours(no_gpu, saved_llama):
    """hf itself takes cuda there, and fails where none is."""
    lm = IntactKVLM(str(saved_llama), dtype="float32")
    assert str(lm.device) == "cpu"
    assert "device" not in lm.hf_arguments


@pytest.mark.parametrize("program", ["/usr/bin/lm_eval", "/usr/bin/lm-eval", "/lib/lm_eval/__main__.py"])
def test_lm_evals_own_default_is_no_choice(no_gpu, saved_llama, monkeypatch, tmp_path, program):
    """Its command line hands over device=cuda:0 and batch_size=1 where the user named none."""
    handed = {"device": "cuda:0", "batch_size": 1, "max_batch_size": None}
    arguments = {"pretrained": str(saved_llama), "dtype": "float32"}

    def made(*flags, **more):
        monkeypatch.setattr(sys, "argv", [program, "--model", "intactkv", "--tasks", "x", *flags])
        return IntactKVLM.create_from_arg_obj({**arguments, **more}, handed)

    assert str(made().device) == "cpu"
    assert str(made(device="cpu").device) == "cpu"
    assert made(batch_size=3).batch_size == 3
    said = ",".join(f"{key}={value}" for key, value in arguments.items())
    monkeypatch.setattr(sys, "argv", [program, "--model", "intactkv", "--tasks", "x"])
    assert str(IntactKVLM.create_from_arg_string(said, handed).device) == "cpu"
    for flags in (["--device", "cuda:0"], ["--device=cuda:0"], ["--dev", "cuda:0"], ["--config", "run.yaml"]):
        Path("run.yaml").write_text("device: cuda:0\n")
        with pytest.raises(ConfigError, match="device=cuda:0: cannot be used here"):
            made(*flags)
    with pytest.raises(ConfigError, match=r"device: given twice, as device=cpu .* and as --device cuda:0"):
        made("--device", "cuda:0", device="cpu")


def test_a_program_that_is_not_lm_evals_has_chosen(no_gpu, saved_llama, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["my_study.py", "--model", "x"])
    with pytest.raises(ConfigError, match="device=cuda:0: cannot be used here"):
        IntactKVLM.create_from_arg_obj({"pretrained": str(saved_llama)}, {"device": "cuda:0"})


def test_a_default_that_is_here_is_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model", "intactkv", "--tasks", "x"])
    assert chosen_flags({}, {"device": "cuda:0", "batch_size": 1}) == {"device": "cuda:0", "batch_size": 1}
