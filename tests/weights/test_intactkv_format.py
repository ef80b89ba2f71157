"""Our own format: written and read back it is the same model, bit for bit, stages and all; and damage is named."""

import json
import shutil

import pytest
import torch
from helpers.tiny import build_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.cell.spec import ActivationSpec
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.input_transforms import apply_input_transforms, calibrate_ranges
from intactkv_eval.model.linear import quantized_layers
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.matrices import matrix_of
from intactkv_eval.model.packed import packed_model
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.quantize.export import export
from intactkv_eval.quantize.rotation import rotate
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.checkpoint import Checkpoint
from intactkv_eval.weights.formats.intactkv import range_tensors
from intactkv_eval.weights.formats.scheme import CheckpointScheme

IDS = torch.arange(2, 40)[None]
A4 = ActivationSpec(bits=4, clip=0.9)
STATIC = ActivationSpec(bits=8, scheme="tensor", symmetric=False, clip=0.99)


def rtn(matrix, name):
    return quantize_rtn(matrix, 4, -1, "quarot", name)


def write(model, out, activations=A4, turned=True, beside=None):
    """What `intactkv quantize` does: the checkpoint, and the same model in memory."""
    rotation = rotate(model) if turned else None
    apply_input_transforms(model, rotation, ActivationSpec())
    static = activations.scheme == "tensor"
    ranges = calibrate_ranges(model, lambda: model(IDS)) if static else None
    apply_input_transforms(model, rotation, activations, ranges)
    layers = {name: rtn(matrix_of(layer), name) for name, layer in linear_layers(model).items()}
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    left_out = {f"{name}.weight" for name in layers} | tied
    others = {name: tensor for name, tensor in model.state_dict().items() if name not in left_out}
    model.config.architectures = [type(model).__name__]
    scheme = CheckpointScheme(4, -1, True, "intactkv_eval:test rtn", ("lm_head",), activations, rotation)
    export(out, "intactkv", scheme, model.config.to_diff_dict(), layers, others | range_tensors(ranges or {}), beside)
    return quantized_model(model, rtn)


def load(folder):
    config = AutoConfig.from_pretrained(folder)
    layout = read_quantization(str(folder), config).layout
    return packed_model(Checkpoint(folder), layout, config, AutoModelForCausalLM, torch.float32)


@pytest.mark.parametrize(
    ("family", "activations", "turned"),
    [("llama", A4, True), ("qwen2", STATIC, True), ("phi3", A4, True), ("opt", STATIC, False), ("llama", ActivationSpec(), True)],
)  # fmt: skip
def test_read_back_it_is_the_same_model(family, activations, turned, tmp_path):
    made, read = write(build_model(family), tmp_path / "out", activations, turned), load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(read(IDS).logits, made(IDS).logits)
    for name, layer in quantized_layers(made).items():
        other = read.get_submodule(name)
        assert torch.equal(layer.quantized_weight().unpacked(), other.quantized_weight().unpacked())
        assert torch.equal(layer.quantized_weight().scales, other.quantized_weight().scales)
        assert (layer.prepare and layer.prepare.spec) == (other.prepare and other.prepare.spec)
        if activations.scheme == "tensor":
            assert torch.equal(layer.prepare.range, other.prepare.range)
    said = read_quantization(str(tmp_path / "out"), AutoConfig.from_pretrained(tmp_path / "out")).summary
    assert (said["method"], said["bits"], said["group_size"], said["symmetric"]) == ("intactkv", 4, -1, True)
    assert said["activations"] == activations.model_dump()
    assert (said["rotation"] is not None) is turned


def test_no_other_library_takes_it_for_one_of_its_own(tmp_path):
    """transformers finds no weights in it, and says so."""
    write(build_model("llama"), tmp_path / "out")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert "model.layers.0.mlp.down_proj.weight" in found["missing_keys"]


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
def test_other_formats_cannot_say_it(layout, tmp_path):
    with pytest.raises(ConfigError, match="others would load it and compute without the rotation"):
        export(tmp_path / "out", layout, CheckpointScheme(4, -1, True, "x", (), A4), {}, {}, {})
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "out"
    write(build_model("llama"), folder, STATIC)
    return folder


def change(said, place, value):
    if value is None:
        del said[place]
    else:
        said[place] = value


@pytest.mark.parametrize(
    ("part", "place", "value", "said"),
    [
        ((), "version", 2, "version 2, this release reads 1"),
        ((), "bits", 5, "bits is 5"),
        ((), "group_size", "a", "group_size is 'a'"),
        ((), "activations", None, "activations cannot be read"),
        (("activations",), "bits", 5, "activations cannot be read"),
        (("activations",), "scheme", "token", "expected none, as no activations are quantized by static ranges"),
        (("rotation",), "online", None, "rotation cannot be read .*online"),
        (("rotation",), "online", {"model.layers.7.mlp.down_proj": 1}, r"rotates the input of model\.layers\.7"),
        (("rotation",), "digests", {"96": "0"}, "Hadamard matrix of order 96 is not the one"),
        *[(("rotation",), "digests", {order: "0"}, "is no order of a row") for order in ("1000004", "0", "6", "abc")],
        (("rotation",), "seed", float("inf"), "rotation cannot be read"),
    ],
)
def test_a_config_that_is_not_the_checkpoints_is_refused(written, tmp_path, part, place, value, said):
    shutil.copytree(written, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    inner = config["quantization_config"]
    for key in part:
        inner = inner[key]
    change(inner, place, value)
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "input_range: expected the tensor"),
        (torch.zeros(3), r"input_range: expected shape \(2,\)"),
        (torch.tensor([0.0, float("nan")]), "input_range: expected finite"),
        (torch.tensor([1.0, -1.0]), "input_range: expected the lowest number before the highest"),
    ],
)
def test_damaged_ranges_are_named(written, tmp_path, value, said):
    shutil.copytree(written, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    change(tensors, "model.layers.1.self_attn.o_proj.input_range", value)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        load(tmp_path / "out")


def test_it_runs_as_a_cell_and_says_what_it_is(tmp_path, saved_llama, llama):
    made = write(llama, tmp_path / "out", A4, beside=saved_llama)
    lm = IntactKVLM(str(tmp_path / "out"), pivot="none", dtype="float32", device="cpu")
    with torch.no_grad():
        assert torch.equal(lm.pivoted_model.model(IDS).logits, made(IDS).logits)
    said = lm.cell_record()["quantization"]
    assert said["activations"]["bits"] == 4
    assert said["rotation"] == {"seed": 0, "online": 6}
