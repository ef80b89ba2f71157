"""A checkpoint that is not what it says is refused, with the tensor, what was expected and what was found."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.packed import packed_model
from intactkv_eval.weights.checkpoint import Checkpoint
from intactkv_eval.weights.formats.patterns import matches
from intactkv_eval.weights.formats.settings import GPTQSettings, check_settings

DATA = Path(__file__).parents[1] / "fixtures" / "gptqmodel"
UP = "model.layers.1.mlp.up_proj"
SLOW = r"(?:a|aa|b|ab)+$"


def load(folder):
    config = AutoConfig.from_pretrained(folder)
    layout = read_quantization(str(folder), config).layout
    return packed_model(Checkpoint(folder), layout, config, AutoModelForCausalLM, torch.float32)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(DATA / "gptq-w4-act-asym", tmp_path / "checkpoint"))


def change(folder, **changes):
    """Tensors of one layer replaced by what the function makes of them, or dropped for None."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, make in changes.items():
        name = f"{UP}.{key}"
        if make is None:
            del tensors[name]
        else:
            tensors[name] = make(tensors[name]).contiguous()
    save_file(tensors, file)


def test_a_pattern_that_never_ends(folder):
    """A stranger's regular expression may not hold up the machine."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["dynamic"] = {r"(?:(.)|(.)|(..))*\d$": {"bits": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"pattern .* takes over 1 s on model\.layers\."):
        load(folder)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(
    "pattern",
    ["(?R)", "(a(?1))", "(?+1)(a)", "(?P<x>a(?&x))", "(?P<x>a(?P>x))", "(?x)(?P<x>a(?P >x))", "(?i:(?sx)a)",
     "(?:a{1000}){1000}", "((a{1,40}){,40})b", "(?:a{32,}){32}"],
)  # fmt: skip
def test_a_pattern_that_takes_gigabytes(pattern):
    """Of a stranger's pattern the length is bounded, and what it may come to as well."""
    settings = {"dynamic": {f"+:{pattern}": {}}}
    with pytest.raises(CheckpointError, match=r"dynamic.*(called|multiply)"):
        check_settings(GPTQSettings, settings)


@pytest.mark.parametrize(
    ("pattern", "matched", "other"),
    [
        (r".*\.layers\.\d{1,2}\..*", "model.layers.12.mlp", "model.layers.123.mlp"),
        (r"(?i)(?:abcd){e<=1}", "ABXD", "wxyz"),
        (r"(?>a){1000}(?P<x>b)(?P=x)(?!R)", f"{'a' * 1000}bb", f"{'a' * 1000}bc"),
    ],
)
def test_patterns_that_are_read(pattern, matched, other):
    """They are taken, and match as the expressions that they are."""
    for sign in ("", "+:", "-:"):
        check_settings(GPTQSettings, {"dynamic": {f"{sign}{pattern}": {}}})
    assert matches(pattern, matched)
    assert not matches(pattern, other)


def test_slow_patterns_have_one_second_together():
    """Each below its second, on each layer: they would take hours."""
    name = next(name for name in ("ab" * n + "!" for n in range(10, 60)) if seconds_of(name) > 0.03)
    begun = time.thread_time()
    with pytest.raises(CheckpointError, match="or those before it have"):
        any(matches(SLOW, name) for _ in range(100))
    assert time.thread_time() - begun < 3
    assert matches("x", "x"), "and others are read after it"


def seconds_of(name):
    begun = time.thread_time()
    matches(SLOW, name)
    return time.thread_time() - begun


def with_value(value):
    def make(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return make


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, rf"{UP}\.scales: expected the tensor, found only g_idx, qweight, qzeros"),
        ({"qzeros": None}, rf"{UP}\.qzeros: expected the tensor"),
        ({"g_idx": None}, rf"{UP}\.g_idx: expected the tensor \(the config says act-order\), found none"),
        ({"qweight": None}, rf"tensors that are missing: \['{UP}\.weight'\].*no place in LlamaForCausalLM: \['{UP}\."),
        ({"scales": lambda t: t[:1]}, rf"{UP}\.scales: expected shape \(2, 128\), found \(1, 128\)"),
        ({"qzeros": lambda t: t[:, :-1]}, rf"{UP}\.qzeros: expected shape \(2, 16\), found \(2, 15\)"),
        ({"qweight": lambda t: t[:-1]}, rf"{UP}\.qweight: expected shape \(8, 128\), found \(7, 128\)"),
        ({"qweight": lambda t: t.to(torch.int64)}, rf"{UP}\.qweight: expected int32, found int64"),
        ({"g_idx": with_value(2)}, rf"{UP}\.g_idx: expected numbers from 0 to 1, found 0 to 2"),
        ({"g_idx": with_value(-1)}, rf"{UP}\.g_idx: expected numbers from 0 to 1, found -1 to 1"),
        ({"g_idx": torch.zeros_like}, rf"{UP}\.g_idx: expected 32 inputs in every group, found 64 to 64"),
        (
            {"scales": with_value(float("nan"))},
            rf"{UP}\.scales: expected finite scales, found 1 NaN or infinite of 256",
        ),
        ({"scales": with_value(float("inf"))}, rf"{UP}\.scales: expected finite scales"),
    ],
)
def test_tensors(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits": 3}, r"qweight: expected shape \(6, 128\), found \(8, 128\)"),
        ({"bits": 5}, "bits is 5; supported are 2, 3, 4, 8"),
        ({"group_size": 16}, r"qzeros: expected shape \(4, 16\), found \(2, 16\)"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"quant_method": "awq", "version": "marlin"}, "AWQ version 'marlin'"),
        ({"quant_method": "awq", "version": "gemm", "bits": 6}, "bits is 6; supported are 2, 3, 4, 8"),
        ({"quant_method": "awq", "version": "gemv", "bits": 3}, "layout gemv of 3 bits"),
    ],
)
def test_config(folder, said, message):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= said
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"format": "marlin-24"}, "format is 'marlin-24'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is set"),
        ({"config_groups": {}}, "config_groups is empty"),
        (
            {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}}},
            "type 'float'",
        ),
    ],
)
def test_compressed_tensors_that_would_be_half_read(folder, said, message):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    groups = {"g": {"targets": ["Linear"], "weights": weights}}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, **said
    }  # fmt: skip
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def shard(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    half = len(names) // 2
    where = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        where.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_the_single_file(folder):
    whole = load(folder)
    shard(folder)
    ids = torch.arange(7)[None]
    assert torch.equal(load(folder)(ids).logits, whole(ids).logits)


def test_files(folder, tmp_path):
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard model-00002-of-00002\.safetensors .* is missing"):
        load(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside the folder or no file"):
        load(folder)
    index.unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model\.bin\).*expected safetensors"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(folder)


def test_an_index_that_names_what_a_shard_has_not(folder):
    shard(folder)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight should be in it"):
        load(folder)
