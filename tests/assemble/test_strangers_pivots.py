"""A PivotKV or a KV codebook that is not such as the model computes: refused, where they would be stretched or stale."""

import json

import pytest
import torch
from helpers.kv_cells import levels_of
from helpers.tiny import BOS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.capture import capture, computed, fingerprint_of
from intactkv_eval.pivot.identity import Calibrated
from intactkv_eval.pivot.kv import PivotKV


def make(folder, **arguments):
    return IntactKVLM(str(folder), dtype="float32", device="cpu", **arguments)


def changed(file, change, **metadata):
    """`file` with `change` made to each of its tensors, by name."""
    with safe_open(file, framework="pt") as held:
        known = held.metadata()
    tensors = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={**known, **metadata})
    return str(file)


@pytest.fixture
def pivot_file(llama, tmp_path):
    file = tmp_path / "p.safetensors"
    capture(llama, (BOS, 7), fingerprint_of(llama, "main")).save(file)
    return file


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda _, tensor: tensor.double(), "float64, and this model computes .* float32"),
        (lambda _, tensor: tensor.bfloat16(), "bfloat16, and this model computes .* float32"),
        (lambda name, tensor: tensor if name == "logits" else tensor[:1], r"keys of layer 0 are \(1, 2, 16\)"),
        (lambda name, tensor: tensor if name == "logits" else tensor[..., :5], r"keys of layer 0 are \(2, 2, 5\)"),
        (lambda name, tensor: tensor.repeat(1, 2) if name == "logits" else tensor, r"logits are \(2, 518\)"),
        (lambda name, tensor: tensor[:, :3] if name == "logits" else tensor, r"logits are \(2, 3\)"),
    ],
)
@pytest.mark.parametrize("cell", [{}, {"weights": "rtn", "bits": 4, "group_size": 32}])
def test_a_pivot_of_other_shapes_or_another_dtype(saved_llama, pivot_file, change, said, cell):
    make(saved_llama, pivot=str(pivot_file), **cell)
    with pytest.raises(PivotError, match=said):
        make(saved_llama, pivot=changed(pivot_file, change), **cell)


@pytest.mark.parametrize("intact", [True, False])
def test_a_pivot_of_tokens_that_the_model_does_not_know(saved_llama, pivot_file, intact):
    file = changed(pivot_file, lambda _, tensor: tensor, token_ids="[99999, 7]")
    with pytest.raises(PivotError, match=r"\[99999\] are outside the model's vocabulary of 259"):
        make(saved_llama, pivot=file, intact=intact)


@pytest.mark.parametrize(
    ("part", "found"), [((slice(1),), r"\(1, 16\)"), ((slice(None), slice(5)), r"\(2, 5\)")], ids=["heads", "width"]
)
def test_levels_for_fewer_channels(saved_llama, llama, tmp_path, part, found):
    file = tmp_path / "l.safetensors"
    levels_of(llama, (BOS,), 1).save(file)
    cell = {"pivot": "bos", "kv_bits": 3, "kv_scheme": "pre_rope", "kv_codebook": str(file)}
    make(saved_llama, **cell)
    changed(file, lambda name, tensor: tensor if name.endswith("levels") else tensor[part])
    with pytest.raises(ConfigError, match=rf"layer 0 has ranges for \(heads, width\) {found}.* are \(2, 16\)"):
        make(saved_llama, **cell)
    few = levels_of(llama, (BOS,), 1)
    with pytest.raises(ConfigError, match="of 3 layers, this model caches keys in 2"):
        few.check_fits([torch.zeros(2, 1, 16)] * 2)


def with_another_rope(folder):
    file = folder / "config.json"
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
    file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))


@pytest.mark.parametrize("reference", [False, True])
def test_the_store_has_no_pivot_for_a_config_that_was_changed(saved_llama, reference):
    """The weights are the same. With a reference it is not even loaded where its pivot is kept."""
    cell = {"pivot": "tokens:256+66+101", **({"reference": str(saved_llama)} if reference else {})}
    before = make(saved_llama, **cell).pivoted_model.pivot
    with_another_rope(saved_llama)
    own = computed(AutoModelForCausalLM.from_pretrained(saved_llama), (BOS, 66, 101))
    found = make(saved_llama, **cell).pivoted_model.pivot
    assert all(torch.equal(one, other) for one, other in zip(found.keys, own.keys, strict=True))
    assert not torch.allclose(found.keys[1], before.keys[1], rtol=0.01)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_a_config_that_was_changed(saved_llama, llama, tmp_path, dtype, trained):
    """Of trained rows the logits tell: they are the full-precision model's."""
    file, llama = tmp_path / "p.safetensors", llama.to(getattr(torch, dtype))
    mark = fingerprint_of(llama, "main")
    if trained:
        made = Calibrated(quantized="x", cell="some", data="x", settings={}, held_out={})
        mark = mark.model_copy(update={"calibrated": made})
    pivot = capture(llama, (BOS, 66, 101, 7, 8), mark)
    rows = tuple(key * (2 if trained else 1 + 2**-9) for key in pivot.keys)
    PivotKV(pivot.token_ids, rows, pivot.values, pivot.logits, mark).save(file)
    cell = {"pretrained": str(saved_llama), "dtype": dtype, "device": "cpu", "pivot": str(file)}
    cell |= {"weights": "rtn", "bits": 4, "group_size": 32, "pivot_transfer": True} if trained else {}
    IntactKVLM(**cell)
    with_another_rope(saved_llama)
    with pytest.raises(PivotError, match="compute other logits" if trained else "compute other KV"):
        IntactKVLM(**cell)


def test_a_layer_that_holds_little_else_than_rounding_is_no_other_config(saved_llama, llama, tmp_path):
    """Sinks have values near zero, which another device computes otherwise; another config is other in all layers."""
    llama = llama.to(torch.bfloat16)
    file = tmp_path / "p.safetensors"
    capture(llama, (BOS, 7), fingerprint_of(llama, "main")).save(file)
    cell = {"pretrained": str(saved_llama), "dtype": "bfloat16", "device": "cpu", "pivot": str(file)}
    changed(file, lambda name, tensor: tensor * 1.07 if name == "values.0" else tensor)
    IntactKVLM(**cell)
    changed(file, lambda name, tensor: tensor * 1.07 if name.startswith("values") else tensor)
    with pytest.raises(PivotError, match="compute other KV"):
        IntactKVLM(**cell)
