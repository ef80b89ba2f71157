"""The command: one message and exit code 2 for the user's faults, nothing half-written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def intactkv(*arguments, cwd=ROOT, **env):
    return subprocess.run(
        [str(BIN / "intactkv"), *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        check=False,
        text=True,
        env={**os.environ, **env},
    )


def test_help_and_version():
    shown = intactkv("--help")
    assert shown.returncode == 0
    for command in ("demo", "eval", "capture", "report", "tasks"):
        assert command in shown.stdout
    assert intactkv("--version").stdout.strip() == "0.1.0.dev0"
    assert Path(intactkv("tasks").stdout.strip()) == ROOT / "tasks"


def test_eval_end_to_end_with_a_config_file(saved_llama, tmp_path):
    """The model from --model_args and a cell, lm_eval's --config YAML, results on disk, and the report of them."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: intactkv\nmodel_args: {{pretrained: {saved_llama}, dtype: float32, weights: rtn, bits: 4, group_size: 32}}\n"
        f"tasks: [intactkv_demo_qa]\nlimit: 10\nbatch_size: 4\ndevice: cpu\noutput_path: {tmp_path / 'out'}\nlog_samples: true\n"
    )
    done = intactkv("eval", "--config", config)
    assert done.returncode == 0, done.stderr[-2000:]
    arguments = f"pretrained={saved_llama},dtype=float32,weights=rtn,bits=4,group_size=32,pivot=none"
    done = intactkv("eval", "--model_args", arguments, "--tasks", "intactkv_demo_qa", "--limit", "10", "--batch_size", "4",
                    "--device", "cpu", "--output_path", tmp_path / "out", "--log_samples")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    table = tmp_path / "table.md"
    assert intactkv("report", tmp_path / "out", "--out", table).returncode == 0
    rows = table.read_text().splitlines()
    assert [row.split(" | ")[3] for row in rows[2:4]] == ["none", "bos"]
    assert "±" in rows[3].split(" | ")[5]


def test_capture_and_use(saved_llama, tmp_path):
    file = tmp_path / "bos.safetensors"
    done = intactkv("capture", saved_llama, "--pivot", "bos", "--dtype", "float32", "--out", file)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[256]" in done.stdout
    assert file.is_file()


@pytest.fixture
def good(saved_llama):
    return [
        "eval",
        "--model_args",
        f"pretrained={saved_llama},dtype=float32",
        "--tasks",
        "intactkv_demo_qa",
        "--limit",
        "2",
        "--device",
        "cpu",
    ]


def replaced(arguments, flag, value):
    out = list(arguments)
    if not value and flag == "--log_samples":
        out.append(flag)
    elif flag in out:
        out[out.index(flag) + 1] = value
    else:
        out += [flag, value]
    return out


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--tasks", "", "no task named"),
        ("--tasks", "no_such_task", "no_such_task"),
        ("--batch_size", "0", "batch_size"),
        ("--model_args", "pretrained=/no/such/model", "/no/such/model"),
        ("--model_args", "pretrained=m,wieghts=rtn", "weights"),
        ("--model_args", "pretrained=m,weights=rtn,bits=5", "bits=5"),
        ("--output_path", "/proc/nowhere", "cannot be written"),
        ("--log_samples", "", "--output_path"),
        ("--samples", '{"intactkv_demo_qa": [0, 1]}', "add --log_samples"),
        ("--model_args", "pretrained=m,max_length=0", "max_length=0"),
    ],
)
def test_bad_calls(good, called, flag, value, said):
    code, stderr = called(*replaced(good, flag, value))
    assert code == 2, stderr[-2000:]
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("intactkv: ")
    assert said in stderr


def test_a_bad_call_as_a_process(good):
    done = intactkv(*replaced(good, "--tasks", "no_such_task"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("intactkv: ")
    assert "Traceback" not in done.stderr


def test_bad_calls_of_the_other_commands(tmp_path, saved_llama, called):
    calls = [
        (["report", tmp_path / "none"], "no such file"),
        (["report", tmp_path], "holds no"),
        (["capture", saved_llama, "--out", tmp_path / "x.bin"], ".safetensors"),
        (["capture", saved_llama, "--out", "/proc/x/y.safetensors"], "cannot be written"),
        (["capture", saved_llama, "--pivot", "none", "--out", tmp_path / "y.safetensors"], "no KV"),
        (["capture", tmp_path / "no-model", "--out", tmp_path / "z.safetensors"], "no-model"),
    ]
    for arguments, said in calls:
        code, stderr = called(*arguments)
        assert code == 2, (arguments, stderr[-2000:])
        assert said in stderr.splitlines()[-1]
        assert "Traceback" not in stderr
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob("*.bin"))
