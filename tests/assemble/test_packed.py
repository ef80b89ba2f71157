"""Packed checkpoints as lm_eval meets them: by folder or hub id, with a reference, on a backend, and in the record."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.tiny import build_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.cli.main import app
from intactkv_eval.errors import CheckpointError, ConfigError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

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
    assert record["quantization"].pop("made")["job"]["method"] == "rtn"
    assert record["quantization"] == {
        "method": "gptq", "bits": 4, "group_size": 32, "symmetric": False, "act_order": False, "mixed": False
    }  # fmt: skip
    assert record["backends"] == {"cpu": 21}
    assert record["pivot_fingerprint"]["basis"] == "plain"
    assert 0.01 < record["basis_residual"] < 0.2
    json.dumps(record)


@pytest.mark.parametrize("said", ["x", ["x"], [], {"job": "rtn"}, {"job": {}, "source": ["m"]}])
def test_a_damaged_record_of_ours(said):
    config = LlamaConfig(quantization_config={"quant_method": "gptq", "bits": 4}, intactkv_quantize=said)
    with pytest.raises(CheckpointError, match=r"intactkv_quantize=.*expected what `intactkv quantize` writes"):
        read_quantization("m", config)


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
        "import sys; from intactkv_eval.lm.intactkv_lm import IntactKVLM\n"
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


def test_identity_is_the_weights_not_their_layout(packed):
    """A baseline and an intact run of two machines, on two backends, are still runs of one model."""
    hashes = {make(packed, pivot="none", dtype="bfloat16", backend=name).cell_record()["source_hash"] for name in ("dense", "cpu")}  # fmt: skip
    assert len(hashes) == 1


@pytest.mark.parametrize(("bits", "group"), [("2", "32"), ("3", "-1"), ("2", "-1")])
def test_coarse_gptq_keeps_the_plain_basis(saved_llama, tmp_path, bits, group):
    """GPTQ scales nothing: the pivot is not touched, however coarse the codes, nor the checkpoint refused."""
    out = tmp_path / "coarse"
    CliRunner().invoke(app, ["quantize", str(saved_llama), "--out", str(out), "--bits", bits, "--group-size", group, "--symmetric"])  # fmt: skip
    lm = make(out, reference=str(saved_llama), dtype="float32")
    plain = make(saved_llama, dtype="float32").pivoted_model.pivot
    for found, expected in zip(lm.pivoted_model.pivot.values, plain.values, strict=True):
        assert torch.equal(found, expected)
    assert lm.cell_record()["pivot_fingerprint"]["basis"] == "plain"
    assert lm.cell_record()["basis_residual"] > 0.2


def test_a_quantized_model_in_memory_is_not_taken_for_full_precision(packed, tokenizer):
    model = make(packed, pivot="none", dtype="float32").model
    with pytest.raises(PivotError, match="is quantized"):
        IntactKVLM(model, tokenizer=tokenizer, device="cpu", batch_size=1)
    lm = IntactKVLM(model, tokenizer=tokenizer, device="cpu", batch_size=1, pivot="none")
    assert lm.cell_record()["quantization"] == make(packed, pivot="none", dtype="float32").cell_record()["quantization"]


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_tied_embeddings_by_either_name_and_stored_apart(tmp_path, tokenizer):
    config = LlamaConfig(**{**build_model("llama").config.to_dict(), "tie_word_embeddings": True})
    source, out = tmp_path / "tied", tmp_path / "packed"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    CliRunner().invoke(app, ["quantize", str(source), "--out", str(out), "--group-size", "32"])
    whole = scores(make(out, pivot="none", dtype="float32"))
    rewrite(out, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert scores(make(out, pivot="none", dtype="float32")) == whole
    rewrite(out, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    lm = make(out, pivot="none", dtype="float32")
    assert (lm.model.model.embed_tokens.weight - lm.model.lm_head.weight).mean() == pytest.approx(1, abs=1e-5)


def test_a_pickled_reference_is_compared_as_it_is_loaded(packed, saved_llama):
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    pickled = saved_llama.parent / "pickled"
    saved_llama.rename(pickled)
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    lm = make(packed, reference=str(pickled), dtype="float32")
    assert 0.01 < lm.cell_record()["basis_residual"] < 0.2
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.normal_()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(PivotError, match=r"layers\.2\.mlp\.up_proj\.weight differs from the reference's"):
        make(packed, reference=str(pickled), dtype="float32")
