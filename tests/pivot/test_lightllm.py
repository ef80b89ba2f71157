"""A PivotKV in LightLLM's keys, read as LightLLM reads it."""

import json

import pytest
import torch

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.exports.lightllm import write_lightllm


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_gets_its_heads(llama, saved_llama, ranks):
    pivot = capture(llama, (256, 5, 6), fingerprint_of(llama, "main"))
    write_lightllm(pivot, saved_llama, ranks)
    config = json.loads((saved_llama / "config.json").read_text())
    assert config["prompt_cache_token_ids"] == [256, 5, 6]
    assert config["model_type"] == "llama"
    heads = 2 // ranks
    for rank in range(ranks):
        file = saved_llama / config["prompt_cache_kv_buffer"][f"rank_{rank}"]
        buffer = torch.load(file, weights_only=True)["kv_buffer"]
        assert buffer.shape == (3, 3, 2 * heads, 16)
        for layer in range(3):
            for head in range(heads):
                whole = rank * heads + head
                assert torch.equal(buffer[layer, :, head], pivot.keys[layer][whole])
                assert torch.equal(buffer[layer, :, heads + head], pivot.values[layer][whole])


def test_bad_calls(llama, saved_llama, tmp_path):
    pivot = capture(llama, (256,), fingerprint_of(llama, "main"))
    with pytest.raises(PivotError, match="2 kv heads cannot be shared out evenly among 3 ranks"):
        write_lightllm(pivot, saved_llama, 3)
    with pytest.raises(PivotError, match=r"no config\.json"):
        write_lightllm(pivot, tmp_path / "nowhere")
    file = saved_llama / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(PivotError, match="a model of 4 layers and 2 kv heads; this pivot has 3 and 2"):
        write_lightllm(pivot, saved_llama)
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(PivotError, match="may have V scaled"):
        write_lightllm(pivot, saved_llama)
    unhashable = json.dumps({**config, "quantization_config": {"quant_method": []}})
    for damaged in ("{", "[" * 100_000, "[]", '{"quantization_config": "awq"}', unhashable, "\ufeff{}"):
        file.write_text(damaged)
        with pytest.raises(PivotError, match="cannot be read as a model's config"):
            write_lightllm(pivot, saved_llama)
    assert not list(saved_llama.glob("prompt_cache*"))
