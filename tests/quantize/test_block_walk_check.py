"""Layers that are run one by one are compared with the model on a second sample before anything is quantized."""

import pytest
import torch
import transformers
from helpers.tiny import _SHAPE, FAMILIES, build_model, uneven
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.quantize.block_walk import BlockWalk

SAMPLES = [torch.arange(3, 40), torch.arange(100, 137), torch.arange(200, 211)]
KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
SHAPE = {**_SHAPE, "head_dim": 16, "sliding_window": 8, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": 259, "num_kv_shared_layers": 3, "num_hidden_layers": 6,
         "layer_types": KINDS * 2}  # fmt: skip


def per_layer(family):
    """Gemma 3n and Gemma 4 E2B: each layer gets an embedding of its own of the tokens, and the last layers borrow keys."""
    if family == "gemma3n":
        more = {"laurel_rank": 8, "altup_num_inputs": 2, "intermediate_size": [96] * 6}
        config = transformers.Gemma3nTextConfig(**{**SHAPE, **more, "activation_sparsity_pattern": [0.0] * 6})
    elif hasattr(transformers, "Gemma4TextConfig"):
        config = transformers.Gemma4TextConfig(**SHAPE, global_head_dim=32)
    else:
        pytest.skip("this transformers has no Gemma 4")
    torch.manual_seed(0)
    return uneven(AutoModelForCausalLM.from_config(config).float().eval(), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gemma3n", "gemma4"])
def test_a_model_whose_layers_get_something_of_each_sample_is_refused(family, dtype, monkeypatch):
    model = per_layer(family).to(dtype)
    monkeypatch.setattr("intactkv_eval.quantize.block_walk.linear_layers", lambda model: {})
    for samples in (SAMPLES, SAMPLES[:1], [torch.full((9,), 7)]):
        with pytest.raises(UnsupportedModelError, match=r"Gemma.*decoder layer \d .*per_layer_input.*--method rtn"):
            BlockWalk(model, samples)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    BlockWalk(model, [])


def test_what_layers_hand_on_beside_hidden_states_is_seen(monkeypatch):
    """Embeddings per layer that do nothing: what is left are keys and values that the last layers borrow."""
    model = per_layer("gemma4")
    monkeypatch.setattr("intactkv_eval.quantize.block_walk.linear_layers", lambda model: {})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.per_layer_projection.weight.zero_()
    with pytest.raises(UnsupportedModelError, match=r"decoder layer 3 .*departs from the model by"):
        BlockWalk(model, SAMPLES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_whose_layers_need_hidden_states_alone_are_walked(family, dtype):
    for samples in (SAMPLES, SAMPLES[2:], [torch.full((9,), 7)], [torch.tensor([5])]):
        BlockWalk(build_model(family, dtype=dtype), samples)


def test_nothing_is_written(tokenizer, tmp_path):
    per_layer("gemma4").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("some prose to calibrate on " * 40)
    options = ["--out", tmp_path / "out", "--method", "gptq", "--bits", 4, "--group-size", -1, "--samples", 2,
               "--length", 24, "--data", tmp_path / "text.txt"]  # fmt: skip
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "model"), *map(str, options)])
    assert isinstance(result.exception, UnsupportedModelError)
    assert not (tmp_path / "out").exists()
