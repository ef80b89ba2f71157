"""PivotKV: a value that comes back from disk as it was, and refuses what is not it."""

import multiprocessing
from dataclasses import replace

import pytest
import torch
from helpers.tiny import BOS, build_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM, T5Config, T5ForConditionalGeneration

from intactkv_eval.cell import formulas
from intactkv_eval.errors import PivotError, UnsupportedModelError
from intactkv_eval.pivot import store
from intactkv_eval.pivot.capture import capture, computed, fingerprint_of, weight_hash
from intactkv_eval.pivot.identity import Calibrated
from intactkv_eval.pivot.kv import PivotKV


@pytest.fixture
def pivot(llama):
    return capture(llama, (BOS, 4, 5), fingerprint_of(llama, "main"))


def test_a_saved_pivot_read_back_is_the_pivot(pivot, tmp_path):
    file = tmp_path / "p.safetensors"
    pivot.save(file)
    back = PivotKV.load(file)
    assert back.token_ids == pivot.token_ids
    assert back.fingerprint == pivot.fingerprint
    pairs = zip((*pivot.keys, *pivot.values, pivot.logits), (*back.keys, *back.values, back.logits), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("size", [0, 7, 100, -1, -500])
def test_a_truncated_file_is_refused(pivot, tmp_path, size):
    file = tmp_path / "p.safetensors"
    pivot.save(file)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(PivotError, match="capture it anew"):
        PivotKV.load(file)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bool, torch.int64, torch.complex64])
def test_rows_are_floating_point(pivot, tmp_path, dtype):
    def changed(tensors):
        tensors["keys.0"] = tensors["keys.0"].to(dtype)

    with pytest.raises(PivotError, match=r"keys\.0 is of torch"):
        PivotKV.load(damaged(pivot, tmp_path / "p.safetensors", changed))


def damaged(pivot, file, change=lambda tensors: None, **metadata):
    """`pivot` in a file, with what `change` does to its tensors and other metadata."""
    pivot.save(file)
    with safe_open(file, framework="pt") as held:
        known = held.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={**known, **metadata})
    return file


@pytest.mark.parametrize(
    "ids", ["[-1, 4, 5]", "[256.9, 4, 5]", '["256", 4, 5]', "[true, 4, 5]", "[1e30, 4, 5]", '{"1": 2}', "7", "null"]
)
def test_token_ids_are_whole_numbers(pivot, tmp_path, ids):
    with pytest.raises(PivotError, match=r"damaged \(token_ids"):
        PivotKV.load(damaged(pivot, tmp_path / "p.safetensors", token_ids=ids))


@pytest.mark.parametrize("shape", [(0, 3, 16), (2, 3, 0)])
def test_there_are_heads_and_they_have_a_width(pivot, tmp_path, shape):
    def emptied(tensors):
        tensors["values.1"] = torch.zeros(shape)

    with pytest.raises(PivotError, match=r"layer 1: .*should be \[H, 3, D\]"):
        PivotKV.load(damaged(pivot, tmp_path / "p.safetensors", emptied))


def test_a_pivot_fits_what_the_model_computes(model):
    """Also where layers differ, as none of these families' do, and in 16 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        own = capture(model.to(dtype), (BOS, 4, 5), fingerprint_of(model, "main"))
        own.check_fits(*computed(model, own.token_ids))
        narrower = replace(own, values=(*own.values[:2], own.values[2][..., :3]))
        with pytest.raises(
            PivotError, match=r"values of layer 2 are \(\d, 3, 3\) in .*this model computes \(\d, 3, 16"
        ):
            narrower.check_fits(*computed(model, own.token_ids))
    with pytest.raises(PivotError, match="3 layers, this model caches KV in 2"):
        own.check_fits(own.keys[:2], own.values[:2], own.logits)


def test_foreign_and_missing_files_are_refused(tmp_path):
    with pytest.raises(PivotError, match="does not exist"):
        PivotKV.load(tmp_path / "none.safetensors")
    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(PivotError, match="no PivotKV"):
        PivotKV.load(file)


@pytest.mark.parametrize(
    "expected",
    [
        {"token_ids": (BOS,)},
        {"weight_hash": "other"},
        {"embedding_hash": "other"},
        {"dtype": "bfloat16"},
        {"basis": "rotated"},
    ],
    ids=lambda expected: next(iter(expected)),
)
def test_another_models_pivot_is_refused(pivot, expected):
    with pytest.raises(PivotError, match="expected"):
        pivot.check_matches(**expected)


def test_the_hash_sees_any_tensor_and_no_place(llama):
    before = weight_hash(llama.named_parameters())
    assert before == weight_hash(build_model("llama").named_parameters())
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1.001)
    assert weight_hash(llama.named_parameters()) != before


def test_overflow_is_caught_with_advice(llama):
    with torch.no_grad():
        llama.model.layers[0].self_attn.k_proj.weight.fill_(float("inf"))
    with pytest.raises(PivotError, match="bfloat16"):
        capture(llama, (BOS,), fingerprint_of(llama, "main"))


def test_models_without_a_kv_cache_are_refused_by_name():
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        capture(mamba, (1,), fingerprint_of(mamba, "main"))
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_heads=2, num_layers=1, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        capture(t5, (1,), fingerprint_of(t5, "main"))


def test_a_pivot_as_long_as_the_model_is_refused(llama):
    with pytest.raises(PivotError, match="no room"):
        capture(llama, tuple([BOS] * 128), fingerprint_of(llama, "main"))


def _save_many(folder, seed):
    model = build_model("llama")
    kept = capture(model, (BOS,), fingerprint_of(model, "main"))
    for _ in range(20):
        kept.save(folder / "same.safetensors")


def test_two_processes_write_the_same_entry(tmp_path):
    """A reader beside two writers sees whole files only."""
    _save_many(tmp_path, 0)
    workers = [multiprocessing.get_context("spawn").Process(target=_save_many, args=(tmp_path, i)) for i in (1, 2)]
    for worker in workers:
        worker.start()
    reads = 0
    while any(worker.is_alive() for worker in workers):
        assert len(PivotKV.load(tmp_path / "same.safetensors")) == 1
        reads += 1
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert reads > 10
    assert [file.name for file in tmp_path.iterdir()] == ["same.safetensors"]


def test_store(pivot, saved_llama, tmp_path, caplog, monkeypatch):
    identity = store.source_identity(str(saved_llama), "main")
    assert store.find(identity, "float32", pivot.token_ids) is None
    store.keep(pivot, identity, "float32")
    assert store.find(identity, "float32", pivot.token_ids).fingerprint == pivot.fingerprint
    assert store.find(identity, "bfloat16", pivot.token_ids) is None
    assert store.find(identity, "float32", (BOS,)) is None
    (saved_llama / "config.json").touch()
    assert store.source_identity(str(saved_llama), "main") == identity
    identities = [identity]
    for name in ("config.json", "tokenizer.json", "modeling_own.py"):
        with (saved_llama / name).open("a") as file:
            file.write("\n")
        identities.append(store.source_identity(str(saved_llama), "main"))
    (saved_llama / "model.safetensors").touch()
    assert len({*identities, store.source_identity(str(saved_llama), "main")}) == 5
    assert store.source_identity("no/such-model", "main") is None
    store.entry_path(identity, "float32", pivot.token_ids).write_bytes(b"junk")
    assert store.find(identity, "float32", pivot.token_ids) is None
    assert "is not used" in caplog.text
    monkeypatch.setenv("INTACTKV_CACHE", str(saved_llama / "config.json"))
    store.keep(pivot, identity, "float32")
    assert "not kept" in caplog.text


@pytest.mark.parametrize("formula", ["pivot", "calibration", "calibration.vicuna"])
def test_a_file_of_an_older_revision_is_refused(pivot, tmp_path, monkeypatch, formula):
    """Files from before revisions were written are of revision 1."""
    settings = {"targets": "released"} if formula == "calibration.vicuna" else {}
    said = Calibrated(quantized="q", cell="c", data="d", settings=settings, held_out={})
    if formula != "pivot":
        pivot = replace(pivot, fingerprint=pivot.fingerprint.model_copy(update={"calibrated": said}))
    monkeypatch.setattr(formulas, "REVISIONS", {**formulas.REVISIONS, formula: 1})
    file = damaged(pivot, tmp_path / "p.safetensors", formulas="{}")
    assert PivotKV.load(file).token_ids == pivot.token_ids
    monkeypatch.setattr(formulas, "REVISIONS", {**formulas.REVISIONS, formula: 2})
    pivot.save(tmp_path / "new.safetensors")
    assert PivotKV.load(tmp_path / "new.safetensors").token_ids == pivot.token_ids
    with pytest.raises(PivotError, match=rf"{formula} of revision 1, now 2: (capture|train) it anew"):
        PivotKV.load(file)
