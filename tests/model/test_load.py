"""Building a quantized model: everything has a place, nothing is skipped, the source stays as it was."""

import pytest
import torch
from helpers.tiny import BOS, FAMILIES, build_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3Config, MixtralConfig

from intactkv_eval.cell.spec import WeightSpec
from intactkv_eval.errors import CheckpointError, ConfigError, PivotError, UnsupportedModelError
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.matrices import matrix_of
from intactkv_eval.model.structure import decoder_layers, layer_devices, linear_layers
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model

SPEC = WeightSpec(method="rtn", bits=4, group_size=32)


def test_every_linear_of_the_layers_and_nothing_else(model):
    made = quantize_model(model, SPEC)
    swapped = {name for name, module in made.named_modules() if isinstance(module, QuantizedLinear)}
    assert swapped == set(linear_layers(model))
    assert len(swapped) >= 3 * 4
    left = {name for name, module in made.named_modules() if type(module) is nn.Linear}
    assert all("layers" not in name and ".h." not in name for name in left)
    assert not isinstance(made.get_output_embeddings(), QuantizedLinear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_is_the_model_with_dequantized_weights(model, dtype):
    """Against the other way to simulate: the same model with its matrices overwritten."""
    model = model.to(dtype)
    made = quantize_model(model, SPEC, "dense")
    with torch.no_grad():
        for name, layer in linear_layers(model).items():
            dense = made.get_submodule(name).quantized_weight().dequantize(dtype)
            assert not torch.equal(matrix_of(layer), dense)
            layer.weight.copy_(dense.t() if type(layer).__name__ == "Conv1D" else dense)
        ids = torch.arange(2, 24)[None]
        torch.testing.assert_close(made(ids).logits, model(ids).logits)
    assert made.get_input_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("depth", [2, 3])
def test_the_text_model_is_quantized_and_no_tower_beside_it(depth):
    """Gemma 3's vision tower comes first, and may be as deep as the text model."""
    text = FAMILIES["gemma3"]().to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": depth, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision)).eval()
    found, (name, layers) = linear_layers(model), decoder_layers(model)
    assert layers is model.get_submodule(name)
    assert set(layers.parameters()) <= set(model.get_decoder().parameters())
    assert {key.partition(".layers.")[0] for key in found} == {name.removesuffix(".layers")}
    assert len(found) == 3 * 7


def test_several_lists_that_may_be_the_decoder_layers(llama):
    llama.model.layers[0].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))  # in a layer: no other list
    assert decoder_layers(llama)[0] == "model.layers"
    llama.model.others = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers and model\.others are lists of 3 modules"):
        decoder_layers(llama)


def test_eight_bits_are_near_full_precision(model):
    ids = torch.arange(2, 24)[None]
    with torch.no_grad():
        full, eight = (
            model(ids).logits,
            quantize_model(model, WeightSpec(method="rtn", bits=8, group_size=16))(ids).logits,
        )
    assert (full - eight).pow(2).mean().sqrt() < 0.05 * full.std()


def test_group_size_that_does_not_divide_names_the_layer(llama):
    with pytest.raises(
        ConfigError, match=r"group_size=128 .* width 64 of model\.layers\.0\.self_attn\.q_proj.*16, 32, 64"
    ):
        quantize_model(llama, WeightSpec(method="rtn", bits=4, group_size=128))


def test_fused_experts_are_refused():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="experts"):
        quantize_model(AutoModelForCausalLM.from_config(config), SPEC)


def test_nan_weights_are_named(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj"):
        quantize_model(llama, SPEC)


def test_quantizing_twice_is_refused(llama):
    with pytest.raises(UnsupportedModelError, match="no linear layer"):
        quantize_model(quantize_model(llama, SPEC), SPEC)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_implementation_is_kept(family):
    model = build_model(family)
    model.set_attn_implementation("eager")
    assert quantize_model(model, SPEC).config._attn_implementation == "eager"


def test_devices_are_by_layer(llama):
    assert [device.type for device in layer_devices(llama)] == ["cpu"] * 3
    llama.model.layers[2].to("meta")
    assert [device.type for device in layer_devices(llama)] == ["cpu", "cpu", "meta"]
    with pytest.raises(CheckpointError, match="offloaded"):
        quantize_model(llama, SPEC)


def test_pivot_rows_go_to_each_layers_device(llama):
    """Two devices without a GPU: the meta device stands for the second."""
    pivot = capture(llama, (BOS, 3), fingerprint_of(llama, "main"))
    devices = [torch.device("cpu"), torch.device("cpu"), torch.device("meta")]
    cache = PivotCache(llama.config, 2, None, pivot, devices)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "cpu", "meta"]
    with pytest.raises(PivotError, match="3 layers, the model 2"):
        PivotCache(llama.config, 2, None, pivot, devices[:2])
