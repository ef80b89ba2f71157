"""`reference=` of another model is refused for checkpoints of any format, and the right one of any architecture is not.

Residuals of the right ones here: 0.004 (8 bits) to 0.6 (2 bits). Of the wrong ones, whose embeddings and norms are the
right model's: 1.3 to 1.5 where one matrix holds other numbers, and 3% of a matrix where all were changed a little.
"""

import json

import pytest
import torch
from helpers.references import SHAPE, load, made, quantize, saved
from helpers.tiny import BOS, build_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.errors import PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.rtn import quantize_rtn


def fp8(source, out):
    """A fine-grained FP8 checkpoint, as it is published: blocks of 32 by 32, and a scale for each."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        blocks = tensor.float().reshape(tensor.shape[0] // 32, 32, tensor.shape[1] // 32, 32)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    return _written(source, out, tensors, {"quantization_config": {**said, "modules_to_not_convert": ["lm_head"]}})


def plain(bits):
    """A copy that says nothing of how it was rounded, stored in 16 bits."""

    def make(source, out):
        model = AutoModelForCausalLM.from_pretrained(source)
        tensors = load_file(source / "model.safetensors")
        for name, layer in linear_layers(model).items():
            if bits < 16:
                weight = quantize_rtn(layer.weight.float(), bits, 32, None, name)
                tensors[f"{name}.weight"] = weight.dequantize(torch.float32)
        return _written(source, out, {name: tensor.bfloat16() for name, tensor in tensors.items()}, {})

    return make


def _written(source, out, tensors, said):
    out.mkdir()
    for file in source.glob("*.json"):
        (out / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **said}))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors", {"format": "pt"}
    )
    return out


FORMATS = {
    "gptq2": lambda source, out: quantize(source, out, "--bits", 2),
    "gptq8": lambda source, out: quantize(source, out, "--bits", 8),
    "awq": lambda source, out: quantize(source, out, "--format", "awq"),
    "compressed-tensors": lambda source, out: quantize(source, out, "--format", "compressed-tensors", "--bits", 4),
    "rotated": lambda source, out: quantize(source, out, "--rotate", "--format", "intactkv"),
    "fp8": fp8,
    "plain 4 bits": plain(4),
    "plain 8 bits": plain(8),
}


def one_layer(model):
    """Other numbers in one matrix; the reference of a checkpoint whose layer was replaced since."""
    torch.nn.init.normal_(model.model.layers[1].mlp.down_proj.weight, std=0.15)


def another(model):
    """Other weights in all layers, behind the same embeddings and the same norms."""
    for name, parameter in model.model.layers.named_parameters():
        if parameter.ndim == 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.15)


def sibling(model):
    """Trained for a while: 3% of every tensor."""
    for parameter in model.parameters():
        parameter.add_(0.03 * parameter.std().nan_to_num(0.1) * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    return saved(build_model("llama"), tmp_path_factory.mktemp("base") / "base", tokenizer)


@pytest.fixture(scope="module")
def wrong(base, tokenizer):
    folders = {}
    for change in (one_layer, another, sibling):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(11)
        with torch.no_grad():
            change(model)
        folders[change.__name__] = saved(model, base.parent / change.__name__, tokenizer)
    return folders


@pytest.fixture(scope="module", params=sorted(FORMATS))
def checkpoint(request, base):
    return request.param, FORMATS[request.param](base, base.parent / request.param.replace(" ", "-"))


@pytest.mark.parametrize("kind", ["one_layer", "another", "sibling"])
def test_a_reference_of_another_model_is_refused(checkpoint, base, wrong, kind):
    name, folder = checkpoint
    with pytest.raises(PivotError) as refused:
        load(folder, wrong[kind])
    said = str(refused.value)
    assert "reference=" in said
    assert "by" in said
    if kind == "one_layer":
        assert "layers.1.mlp.down_proj" in said, name


def test_the_right_reference_is_accepted_and_the_residual_recorded(checkpoint, base):
    name, folder = checkpoint
    lm = load(folder, base)
    bounds = {"gptq2": (0.2, 0.7), "gptq8": (0.001, 0.02), "fp8": (0.01, 0.05), "plain 8 bits": (0.001, 0.02)}
    low, high = bounds.get(name, (0.02, 0.3))
    assert low < lm.cell_record()["basis_residual"] < high


def test_a_16_bit_copy_is_compared_too(base, wrong, tmp_path):
    copied = plain(16)(base, tmp_path / "copied")
    assert load(copied, base).cell_record()["basis_residual"] is None
    for kind in wrong:
        with pytest.raises(PivotError, match=r"is not made from|does not belong"):
            load(copied, wrong[kind])


@pytest.mark.parametrize("name", ["gptq2", "fp8"])
def test_a_pivot_file_carries_the_sample(base, wrong, tmp_path, name):
    """No reference is there to be read; a file of a model with the same embeddings is refused alike."""
    folder = FORMATS[name](base, tmp_path / name)
    for kind, source in (("right", base), *wrong.items()):
        model = AutoModelForCausalLM.from_pretrained(source)
        file = tmp_path / f"{kind}.safetensors"
        capture(model, (BOS,), fingerprint_of(model, "main")).save(file)
        options = {"pivot": str(file), "dtype": "float32", "device": "cpu"}
        if kind == "right":
            assert IntactKVLM(str(folder), **options).cell_record()["basis_residual"] > 0.01
            continue
        with pytest.raises(PivotError, match=r"is not made from the model of|does not belong"):
            IntactKVLM(str(folder), **options)


def test_a_kept_pivot_is_compared_as_a_fresh_one(base, wrong, tmp_path):
    """The second time the reference is not loaded, and another one is refused all the same."""
    folder = FORMATS["gptq2"](base, tmp_path / "out")
    for _ in range(2):
        assert load(folder, base).cell_record()["basis_residual"] > 0.1
        with pytest.raises(PivotError, match=r"layers\.1\.mlp\.down_proj"):
            load(folder, wrong["one_layer"])


def test_a_padded_vocabulary(base, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(320)
    folder = quantize(saved(model, tmp_path / "padded", tokenizer), tmp_path / "out")
    lm = load(folder, base)
    logits = lm.pivoted_model.pivot.logits
    assert logits.shape == (1, 320)
    plain_lm = load(quantize(base, tmp_path / "plain"), base)
    assert torch.equal(logits[:, :259], plain_lm.pivoted_model.pivot.logits)


def test_bitsandbytes(tokenizer, tmp_path):
    """Needs the library, which the tests do not ask for; its layers' kind is in tests/pivot/test_same_weights.py."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    base = saved(made(LlamaConfig(**{**SHAPE, "intermediate_size": 128})), tmp_path / "base", tokenizer)
    for said in ({"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}):
        out = tmp_path / next(iter(said))
        given = BitsAndBytesConfig(**said)
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=given, device_map="cpu")
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        assert 0.001 < load(out, base).cell_record()["basis_residual"] < 0.2
        for change in (one_layer, another, sibling):
            other = AutoModelForCausalLM.from_pretrained(base)
            torch.manual_seed(11)
            with torch.no_grad():
                change(other)
            folder = saved(other, tmp_path / f"{out.name}-{change.__name__}", tokenizer)
            with pytest.raises(PivotError, match=r"is not made from|does not belong"):
                load(out, folder)


def test_a_reference_beside_a_pivot_file(base, wrong, tmp_path):
    """`intactkv figures` and `calibrate` set the full-precision model beside a cell whose pivot is a file's."""
    folder, file, text = FORMATS["gptq2"](base, tmp_path / "out"), tmp_path / "p.safetensors", tmp_path / "text.txt"
    model = AutoModelForCausalLM.from_pretrained(base)
    capture(model, (BOS,), fingerprint_of(model, "main")).save(file)
    text.write_text("some words of prose that are here " * 60)
    for command, more in (
        ("figures", ["--data", text, "--samples", 1, "--length", 24]),
        ("calibrate", ["--data", text]),
    ):
        out = tmp_path / ("figures" if command == "figures" else "out.safetensors")
        cell = f"pretrained={folder},reference={wrong['one_layer']},dtype=float32,pivot={file}"
        done = CliRunner().invoke(app, [command, "--model_args", cell, "--out", str(out), *map(str, more)])
        assert "layers.1.mlp.down_proj.weight" in str(done.exception)
