"""`intactkv calibrate`: a cell and conversations in, a PivotKV out that belongs to that quantized model alone."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.kv import PivotKV

CELL = "dtype=float32,weights=rtn,bits=3,group_size=32"
FAST = ["--epochs", 2, "--batch-size", 4, "--learning-rate", "1e-2", "--min-assistant-tokens", 3, "--max-tokens", 60]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("talks") / "talks.jsonl"
    rows = [[("user", f"say {n}"), ("assistant", f"well, {n} it is")] for n in range(8)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    path.write_text("\n".join(lines))
    return path


def calibrate(cell, data, out, *more):
    arguments = ["--model_args", cell, "--data", data, "--out", out, *FAST, *more]
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)])


@pytest.mark.parametrize("pivot", ["prompt", "bos"])
def test_the_trained_rows_are_better_and_belong_to_their_model(saved_llama, talks, tmp_path, pivot):
    out = tmp_path / "p.safetensors"
    result = calibrate(f"pretrained={saved_llama},{CELL},pivot={pivot}", talks, out)
    assert result.exit_code == 0, result.output
    made = PivotKV.load(out)
    said = made.fingerprint.calibrated
    assert said.cell.endswith("rtn w3 g32")
    before, after = said.held_out["blocks"]
    assert after < before
    assert f"{after:.4g}" in result.output
    assert f"(full precision {said.full_nll:.4g})" in result.output
    assert said.full_nll == pytest.approx(said.held_out["nll"][0], abs=0.05), "a model that was never trained"
    assert (tmp_path / "p.csv").read_text().startswith("epoch,step,loss")
    assert not list(tmp_path.glob(".p*"))
    captured = IntactKVLM(str(saved_llama), dtype="float32", pivot=pivot, device="cpu").pivoted_model.pivot
    assert captured.token_ids == made.token_ids
    assert not torch.equal(captured.keys[0], made.keys[0])
    own = {"dtype": "float32", "weights": "rtn", "bits": 3, "group_size": 32, "device": "cpu"}
    lm = IntactKVLM(str(saved_llama), pivot=str(out), **own)
    assert torch.equal(lm.pivoted_model.pivot.keys[1], made.keys[1])
    assert lm.cell_record()["pivot_fingerprint"]["calibrated"]["data"] == said.data
    for other in (
        {"bits": 4},
        {"group_size": 16},
        {"act_bits": 8},
        {"weights": "none", "bits": None, "group_size": None},
    ):
        with pytest.raises(PivotError, match=r"calibrated for .* another quantized model"):
            IntactKVLM(str(saved_llama), pivot=str(out), **{**own, **other})
    allowed = IntactKVLM(str(saved_llama), pivot=str(out), pivot_transfer=True, **{**own, "bits": 4})
    assert torch.equal(allowed.pivoted_model.pivot.values[0], made.values[0])
    with pytest.raises(ConfigError, match="pivot_transfer: does nothing"):
        IntactKVLM(str(saved_llama), pivot=str(out), pivot_transfer=True, **own)


def test_a_file_tells_that_vicunas_targets_are_the_released_ones(saved_llama, talks, tmp_path):
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        content = json.loads((saved_llama / name).read_text()) | {key: 512}
        (saved_llama / name).write_text(json.dumps(content))
    for template, said in ((None, None), ("vicuna_v1.1", "released")):
        cell = f"pretrained={saved_llama},{CELL},pivot=prompt" + (f",chat_template={template}" if template else "")
        result = calibrate(cell, talks, tmp_path / "p.safetensors", "--max-tokens", 400)
        assert result.exit_code == 0, result.output
        made = PivotKV.load(tmp_path / "p.safetensors").fingerprint.calibrated
        assert made.settings.get("targets") == said


def test_two_processes_train_what_one_does(saved_llama, talks, tmp_path):
    """Started as `accelerate launch` starts them on GPUs. One of them writes, and speaks."""
    cell = f"pretrained={saved_llama},{CELL},pivot=bos"
    assert calibrate(cell, talks, tmp_path / "one.safetensors").exit_code == 0
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "intactkv_eval.cli", "calibrate"]
    options = ["--model_args", cell, "--data", talks, "--out", tmp_path / "two.safetensors", *FAST]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, *map(str, [*launch, *options])], check=False, capture_output=True, text=True,
                          env=env, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("two.safetensors: for") == 1
    one, two = (PivotKV.load(tmp_path / f"{name}.safetensors").fingerprint.calibrated for name in ("one", "two"))
    assert (one.settings["processes"], two.settings["processes"]) == (1, 2)
    for name, (_, after) in one.held_out.items():
        assert two.held_out[name][1] == pytest.approx(after, rel=1e-3)
    assert not list(tmp_path.glob(".two*"))


def test_training_goes_on_from_calibrated_rows(saved_llama, talks, tmp_path):
    """What the full-precision model says is asked behind its own rows, whatever the first ones are."""
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert calibrate(f"pretrained={saved_llama},{CELL},pivot=prompt", talks, first).exit_code == 0
    result = calibrate(f"pretrained={saved_llama},{CELL},pivot={first}", talks, second)
    assert result.exit_code == 0, result.output
    one, other = (PivotKV.load(path).fingerprint.calibrated.held_out["blocks"] for path in (first, second))
    assert other[0] == pytest.approx(one[1], rel=1e-4)
    assert other[1] <= other[0]


def test_transfer_needs_a_file_and_a_calibrated_one(saved_llama, tmp_path):
    own = {"dtype": "float32", "weights": "rtn", "bits": 3, "group_size": 32, "device": "cpu"}
    with pytest.raises(ConfigError, match="does nothing without pivot=FILE"):
        IntactKVLM(str(saved_llama), pivot="bos", pivot_transfer=True, **own)
    plain = IntactKVLM(str(saved_llama), **own).pivoted_model.pivot
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="is not calibrated"):
        IntactKVLM(str(saved_llama), pivot=str(tmp_path / "plain.safetensors"), pivot_transfer=True, **own)


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "quarot"])
def test_packed_checkpoints(saved_llama, talks, tmp_path, method):
    """In the checkpoint's own basis: loss before training is that of the uncalibrated cell, and it falls."""
    (tmp_path / "text.txt").write_text("some prose to calibrate on " * 40)
    chosen = {"rtn": ["--method", "rtn", "--format", "gptq"], "gptq": ["--method", "gptq"], "awq": ["--method", "awq"],
              "quarot": ["--method", "rtn", "--rotate", "--act-bits", 8]}[method]  # fmt: skip
    data = ["--data", tmp_path / "text.txt", "--samples", 4, "--length", 24] if method in {"gptq", "awq"} else []
    packed = tmp_path / "packed"
    options = ["--bits", 4, "--group-size", 32, "--dtype", "float32", "--out", packed, *chosen, *data]
    assert CliRunner().invoke(app, ["quantize", str(saved_llama), *map(str, options)]).exit_code == 0
    out = tmp_path / "p.safetensors"
    cell = f"pretrained={packed},reference={saved_llama},dtype=float32,pivot=prompt"
    result = calibrate(cell, talks, out)
    assert result.exit_code == 0, result.output
    before, after = PivotKV.load(out).fingerprint.calibrated.held_out["blocks"]
    assert after < before < 5
    lm = IntactKVLM(str(packed), pivot=str(out), dtype="float32", device="cpu")
    assert lm.pivoted_model.pivot.fingerprint.calibrated is not None
    on = f"pretrained={packed},reference={saved_llama},dtype=float32,pivot={out}"
    result = calibrate(on, talks, tmp_path / "on.safetensors")
    assert result.exit_code == 0, result.output
    again = PivotKV.load(tmp_path / "on.safetensors").fingerprint.calibrated.held_out["blocks"]
    assert again[0] == pytest.approx(after, rel=1e-4)
    drawn = [
        "--model_args",
        on,
        "--data",
        tmp_path / "text.txt",
        "--samples",
        2,
        "--length",
        24,
        "--out",
        tmp_path / "f",
    ]
    result = CliRunner().invoke(app, ["figures", *map(str, drawn)])
    assert result.exit_code == 0, result.output
    with pytest.raises(ConfigError, match="drop one of the two"):
        IntactKVLM(str(packed), reference=str(saved_llama), pivot=str(out), dtype="float32", device="cpu")


def test_outputs_recomputed_for_want_of_room_are_the_same(saved_llama, talks, tmp_path):
    cell = f"pretrained={saved_llama},{CELL},pivot=prompt"
    for name, more in (("kept", []), ("again", ["--disk-budget", 0])):
        assert calibrate(cell, talks, tmp_path / f"{name}.safetensors", *more).exit_code == 0
    kept, again = (PivotKV.load(tmp_path / f"{name}.safetensors") for name in ("kept", "again"))
    assert all(torch.equal(a, b) for a, b in zip(kept.keys + kept.values, again.keys + again.values, strict=True))


def test_questions_are_answered_by_the_model_itself(saved_llama, tmp_path, monkeypatch):
    lines = [json.dumps({"turns": [f"what is {n}?", "and then?"]}) for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    cell, out = f"pretrained={saved_llama},{CELL},pivot=prompt", tmp_path / "p.safetensors"
    refused = calibrate(cell, tmp_path / "q.jsonl", out)
    assert refused.exit_code != 0
    assert "--generate-answers" in str(refused.exception)
    lengths = []
    monkeypatch.setattr(IntactKVLM, "_rows_that_fit", lambda lm, tokens: lengths.append(tokens) or 2)
    result = calibrate(cell, tmp_path / "q.jsonl", out, "--generate-answers", 8)
    assert lengths, "as many at a time as fit"
    assert result.exit_code == 0, result.output
    rows = [json.loads(line)["messages"] for line in (tmp_path / "p.answers.jsonl").read_text().splitlines()]
    assert [[message["role"] for message in row] for row in rows] == [["user", "assistant"] * 2] * 4
    out.unlink()
    assert calibrate(cell, tmp_path / "p.answers.jsonl", out).exit_code == 0
    (tmp_path / "p.answers.jsonl").rename(tmp_path / "answered.jsonl")
    with pytest.raises(ConfigError, match="does nothing"):
        raise calibrate(cell, tmp_path / "answered.jsonl", out, "--generate-answers", 8).exception
    few = calibrate(
        cell, tmp_path / "q.jsonl", tmp_path / "few.safetensors", "--generate-answers", 8, "--conversations", 3
    )
    assert few.exit_code == 0, few.output
    assert len((tmp_path / "few.answers.jsonl").read_text().splitlines()) == 3, "no more are answered than are used"
    assert PivotKV.load(tmp_path / "few.safetensors").fingerprint.calibrated.settings["conversations"] == 3


@pytest.mark.parametrize(
    ("cell", "more", "said"),
    [
        ("pivot=none", [], "needs intact pivot rows"),
        ("pivot=bos,kv_bits=4", [], "drop kv_bits"),
        ("pivot=bos", ["--param-dtype", "float16"], "float32 or bfloat16"),
        ("pivot=bos", ["--held-out", "1"], "between 0 and 1"),
        ("pivot=bos,device=cpu", [], "give it once"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(saved_llama, talks, tmp_path, cell, more, said):
    shutil.rmtree(saved_llama)
    result = calibrate(f"pretrained={saved_llama},{CELL},{cell}", talks, tmp_path / "p.safetensors", *more)
    assert said in str(result.exception)
