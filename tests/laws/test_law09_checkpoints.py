"""Law 9: reading a checkpoint is the writing library's own dequantization, exactly.

The fixtures were packed by AutoGPTQ, AutoAWQ and GPTQModel themselves (tests/fixtures/make_*.py say how), and hold what those
libraries make of their own bytes; compressed-tensors is asked here.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.model.linear import quantized_layers
from intactkv_eval.model.packed import packed_model
from intactkv_eval.weights.checkpoint import Checkpoint
from intactkv_eval.weights.formats import format_of
from intactkv_eval.weights.formats.layer import LayerTensors

DATA = Path(__file__).parents[1] / "fixtures"


def packed_layers(library, *layouts):
    with safe_open(DATA / f"{library}.safetensors", framework="pt") as file:
        cases = json.loads(file.metadata()["cases"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = []
    for case, facts in cases.items():
        if not case.startswith(layouts or ""):
            continue
        held = {key.removeprefix(f"{case}."): value for key, value in tensors.items() if key.startswith(f"{case}.")}
        found.append(pytest.param(facts, held, id=case))
    return found


def read(config, tensors, facts):
    return format_of(config).read(LayerTensors("q_proj", tensors, facts["in_features"], facts["out_features"]))


@pytest.mark.parametrize(("facts", "tensors"), packed_layers("autogptq"))
def test_autogptq(facts, tensors):
    config = {"quant_method": "gptq", **{key: facts[key] for key in ("bits", "group_size", "desc_act", "sym")}}
    assert torch.equal(read(config, tensors, facts).dequantize(torch.float16), tensors["dequantized"])


@pytest.mark.parametrize(("facts", "tensors"), packed_layers("autoawq", "gemm", "gemv-"))
def test_autoawq(facts, tensors):
    found = read(facts["quantization_config"], tensors, facts)
    assert torch.equal(found.dequantize(torch.float16), tensors["dequantized"])


@pytest.mark.parametrize("name", sorted(folder.name for folder in (DATA / "gptqmodel").iterdir()))
def test_gptqmodel(name):
    """Whole checkpoints of a small Llama: every layer that the library itself would run quantized, and no other."""
    folder = DATA / "gptqmodel" / name
    config = AutoConfig.from_pretrained(folder)
    layout = read_quantization(str(folder), config).layout
    model = packed_model(Checkpoint(folder), layout, config, AutoModelForCausalLM, torch.float32)
    expected = json.loads((folder / "dequantized.json").read_text())
    found = {
        layer: hashlib.sha256(module.quantized_weight().dequantize(torch.float16).numpy().tobytes()).hexdigest()
        for layer, module in quantized_layers(model).items()
    }
    assert found == expected
    assert torch.isfinite(model(torch.arange(9)[None]).logits).all()


def compressed(weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("strategy", "group"), [("group", 32), ("channel", None)])
def test_compressed_tensors(bits, symmetric, strategy, group):
    outputs, inputs = 24, 160
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    generator = torch.Generator().manual_seed(bits)
    shape = (outputs, inputs // group if group else 1)
    low, high = (0, 1) if symmetric else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    state = {
        "weight": torch.randn(outputs, inputs, generator=generator).to(torch.float16),
        "weight_scale": (torch.rand(shape, generator=generator) + 0.1).to(torch.float16),
        "weight_zero_point": torch.randint(low, high, shape, generator=generator).to(torch.int8),
    }
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = library.compress(state, scheme)
    found = read(compressed(args.model_dump()), packed, {"in_features": inputs, "out_features": outputs})
    assert torch.equal(found.dequantize(torch.float16), library.decompress(packed, scheme)["weight"])


def test_compressed_tensors_with_act_order():
    """`actorder: group` of older releases: each input names its group."""
    codes = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(0))
    index = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32
    scale = torch.rand(8, 2).to(torch.float16)
    tensors = {
        "weight_packed": pack_to_int32((codes - 8).to(torch.int8), 4),
        "weight_scale": scale,
        "weight_shape": torch.tensor([8, 64]),
        "weight_g_idx": index.to(torch.int32),
    }
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 32,
        "actorder": "group",
    }
    found = read(compressed(weights), tensors, {"in_features": 64, "out_features": 8})
    assert found.order is not None
    assert torch.equal(found.dequantize(torch.float16), (codes - 8).to(torch.float16) * scale[:, index])


def test_compressed_tensors_before_dense_packing():
    """Three bits used to lie ten in a word."""
    codes = torch.randint(0, 8, (8, 64), generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(codes, (0, 6)).view(8, 7, 10)
    words = (padded << (3 * torch.arange(10))).sum(-1).to(torch.int32)
    scale = torch.full((8, 1), 0.5, dtype=torch.float16)
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([8, 64])}
    weights = {"num_bits": 3, "type": "int", "symmetric": True, "strategy": "channel"}
    found = read(compressed(weights), tensors, {"in_features": 64, "out_features": 8})
    assert torch.equal(found.dequantize(torch.float16), ((codes - 4) * 0.5).to(torch.float16))
