"""Packed checkpoints as lm_eval meets them: by folder or hub id, with a reference, on a backend, and in the record."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import build_model
from typer.testing import CliRunner

from intactkv_eval.cli import app
from intactkv_eval.errors import CheckpointError, ConfigError, PivotError
from intactkv_eval.harness.lm import IntactKVLM

REQUESTS = [(None, [5, 6, 7], [8, 9]), (None, [5], [6, 7, 8, 9]), (None, list(range(40, 60)), [60])]


@pytest.fixture
def packed(saved_llama, tmp_path):
    out = tmp_path / "packed"
    done = CliRunner().invoke(app, ["quantize", str(saved_llama), "--out", str(out), "--group-size", "32", "--dtype", "bfloat16"])  # fmt: skip
    assert done.exit_code == 0, done.output
    return out


def make(folder, **arguments):
    return IntactKVLM(str(folder), device="cpu", batch_size=2, **arguments)


def scores(lm):
    return [value for value, _ in lm._loglikelihood_tokens(REQUESTS, disable_tqdm=True)]


def test_the_record_says_what_ran(packed, saved_llama):
    lm = make(packed, reference=str(saved_llama), dtype="bfloat16")
    record = lm.cell_record()
    assert record["quantization"] == {
        "method": "gptq", "bits": 4, "group_size": 32, "symmetric": False, "act_order": False, "mixed": False
    }  # fmt: skip
    assert record["backends"] == {"cpu": 21}
    assert record["pivot_fingerprint"]["basis"] == "plain"
    assert 0.01 < record["basis_residual"] < 0.2
    json.dumps(record)


def test_backends_agree(packed, saved_llama):
    """In bf16 up to its rounding; in fp32 the kernel's tiles are dense's weights."""
    for dtype, tolerance in (("bfloat16", 0.15), ("float32", 1e-4)):
        found = {name: scores(make(packed, pivot="none", dtype=dtype, backend=name)) for name in ("dense", "cpu")}
        assert found["cpu"] == pytest.approx(found["dense"], abs=tolerance)


def test_an_fp32_reference_of_a_16_bit_checkpoint(packed, saved_llama, tokenizer, tmp_path):
    """The checkpoint holds the embeddings rounded: accepted, and another model's are not."""
    intact = make(packed, reference=str(saved_llama), dtype="float32")
    assert scores(intact) != scores(make(packed, pivot="none", dtype="float32"))
    other = tmp_path / "other"
    build_model("llama", seed=4).save_pretrained(other)
    tokenizer.save_pretrained(other)
    with pytest.raises(PivotError, match="does not belong to this model"):
        make(packed, reference=str(other), dtype="float32")


def test_options_that_would_do_nothing(packed, saved_llama):
    with pytest.raises(ConfigError, match="backend=cpu: does nothing"):
        make(saved_llama, backend="cpu")
    with pytest.raises(ConfigError, match="quantized already"):
        make(packed, weights="rtn", bits=4, group_size=32, pivot="none")
    with pytest.raises(CheckpointError, match="use_safetensors would do nothing"):
        make(packed, pivot="none", use_safetensors=True)


def test_by_hub_id_from_the_hubs_cache(packed, tmp_path):
    """Offline, from a snapshot as the hub's client keeps it."""
    commit = "0" * 40
    repo = tmp_path / "hub" / "models--someone--packed"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    packed.rename(repo / "snapshots" / commit)
    program = (
        "import sys; from intactkv_eval.harness.lm import IntactKVLM\n"
        "lm = IntactKVLM('someone/packed', pivot='none', dtype='float32', device='cpu', batch_size=1)\n"
        "print(lm.cell_record()['backends'], lm.cell_record()['quantization']['method'])"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "{'dense': 21} gptq"


def test_older_writers_config_beside_the_weights(packed):
    """AutoGPTQ's early releases said how in quantize_config.json alone, and named the file by bits and group."""
    config = json.loads((packed / "config.json").read_text())
    said = config.pop("quantization_config")
    (packed / "config.json").write_text(json.dumps(config))
    (packed / "quantize_config.json").write_text(json.dumps({k: v for k, v in said.items() if k != "quant_method"}))
    (packed / "model.safetensors").rename(packed / "gptq_model-4bit-32g.safetensors")
    lm = make(packed, pivot="none", dtype="float32")
    assert lm.cell_record()["quantization"]["method"] == "gptq"
    assert torch.isfinite(torch.tensor(scores(lm))).all()
