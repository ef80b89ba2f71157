"""Checkpoints of other releases: their tensors' names, their config beside or inside another, and on the hub."""

import json
import shutil

import pytest
import torch
from helpers.packed_files import GPTQ, ct_config, packed_tensors, written
from helpers.references import SHAPE, load, made, saved
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from intactkv_eval.errors import CheckpointError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

TOKENS = torch.arange(60, 90)[None]
CONFIGS = {"gptq": GPTQ, "compressed-tensors": ct_config()}


def plain_logits(base, out, tensors):
    model = AutoModelForCausalLM.from_pretrained(written(base, out, tensors), dtype=torch.float32).eval()
    return model(TOKENS).logits


def logits(folder, **options):
    lm = IntactKVLM(str(folder), **{"pivot": "none", "dtype": "float32", "device": "cpu", "batch_size": 1, **options})
    return lm._model(TOKENS).logits


def is_projection(name):
    return name.endswith("_proj.weight") and "vision" not in name


@pytest.fixture
def llama(tokenizer, tmp_path):
    return saved(made(LlamaConfig(**SHAPE)), tmp_path / "llama", tokenizer)


@pytest.fixture
def gemma(tokenizer, tmp_path):
    """The wrapper that Gemma 3 of 4B and more is, its files named as this release of transformers names them."""
    config = Gemma3Config(
        text_config={**SHAPE, "head_dim": 16, "sliding_window": 16},
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=250, boi_token_index=251, eoi_token_index=252,
    )  # fmt: skip
    folder = saved(made(config), tmp_path / "gemma", tokenizer)
    assert any(name.startswith("language_model.model.layers") for name in load_file(folder / "model.safetensors"))
    return folder


def of_the_model(name):
    """As the modules are called, and as transformers 4.52 and later named files for a while."""
    if name.startswith("language_model."):
        return name.replace("language_model.model.", "model.language_model.", 1)
    return f"model.{name}"


def of_the_hub(name):
    return name.replace("vision_tower.encoder", "vision_tower.vision_model.encoder")


@pytest.mark.parametrize(
    ("layout", "rename"),
    [("compressed-tensors", str), ("compressed-tensors", of_the_model), ("gptq", of_the_hub)],
)
def test_a_wrapper_under_any_of_its_names(gemma, tmp_path, layout, rename):
    packed, plain = packed_tensors(gemma, layout, is_projection, rename)
    folder = written(gemma, tmp_path / "packed", packed, CONFIGS[layout])
    assert torch.allclose(logits(folder), plain_logits(gemma, tmp_path / "plain", plain), rtol=1e-4, atol=1e-4)
    renamed = {rename(name): value for name, value in load_file(gemma / "model.safetensors").items()}
    reference = written(gemma, tmp_path / "reference", renamed)
    lm = load(folder, reference)
    assert torch.equal(lm.pivoted_model.pivot.values[0], load(folder, gemma).pivoted_model.pivot.values[0])


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_in_the_config_of_the_text_decoder(gemma, tmp_path, key):
    packed, plain = packed_tensors(gemma, "compressed-tensors", is_projection)
    text = json.loads((gemma / "config.json").read_text())["text_config"]
    folder = written(gemma, tmp_path / "packed", packed, text_config={**text, key: ct_config()})
    assert torch.allclose(logits(folder), plain_logits(gemma, tmp_path / "plain", plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", ["embed_out", "lm_head"])
def test_pythia(tokenizer, tmp_path, head):
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    model = made(GPTNeoXConfig(**shape))
    base = saved(model, tmp_path / "pythia", tokenizer)
    own = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    if head not in {"embed_out", own}:
        pytest.skip("this release of transformers calls it embed_out only")

    def is_packed(name):
        return name.endswith("weight") and "layers." in name and "norm" not in name

    packed, plain = packed_tensors(base, "gptq", is_packed, lambda name: name.replace("embed_out", head))
    folder = written(base, tmp_path / "packed", packed, GPTQ)
    assert torch.allclose(logits(folder), plain_logits(base, tmp_path / "plain", plain), rtol=1e-4, atol=1e-4)


MOE = {
    "qwen3": Qwen3MoeConfig(**SHAPE, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mixtral": MixtralConfig(**SHAPE, num_local_experts=4),
}


@pytest.mark.parametrize("parts", ["experts", "attention"])
@pytest.mark.parametrize("family", sorted(MOE))
def test_experts_are_named_as_what_is_not_read(tokenizer, tmp_path, family, parts):
    """They are no damaged download, whichever part of the model is packed."""
    base = saved(made(MOE[family]), tmp_path / "moe", tokenizer)

    def is_packed(name):
        return (".experts." in name) if parts == "experts" else "self_attn" in name and name.endswith("proj.weight")

    packed, _ = packed_tensors(base, "gptq", is_packed)
    with pytest.raises(CheckpointError, match=r"mixture of experts.*experts\.0.*with experts are not read yet") as told:
        logits(written(base, tmp_path / "packed", packed, GPTQ))
    assert "missing" not in str(told.value)
    assert "damaged" not in str(told.value)


OLDER = {
    "beside sparsity": {"compression_config": ct_config(sparsity_config={"format": "dense", "global_sparsity": 0.1})},
    "apart": {"compression_config": {"quantization_config": ct_config(), "sparsity_config": {"format": "dense"}}},
    "sparseml": {"quantization_config": ct_config(quant_method="sparseml")},
}


@pytest.mark.parametrize("name", sorted(OLDER))
def test_older_compressed_tensors(llama, tmp_path, name):
    packed, plain = packed_tensors(llama, "compressed-tensors", is_projection)
    folder = written(llama, tmp_path / "packed", packed, **OLDER[name])
    assert torch.allclose(logits(folder), plain_logits(llama, tmp_path / "plain", plain), rtol=1e-4, atol=1e-4)
    assert load(folder, llama).cell_record()["quantization"]["method"] == "compressed-tensors"


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_quantizes_nothing(llama, tmp_path, key):
    said = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense", "global_sparsity": 0.5}}
    folder = written(llama, tmp_path / "dense", load_file(llama / "model.safetensors"), **{key: said})
    assert torch.equal(logits(folder), logits(llama))


def test_weights_that_are_sparse(llama, tmp_path):
    packed, _ = packed_tensors(llama, "compressed-tensors", is_projection)
    sparse = {"format": "sparse-24-bitmask", "global_sparsity": 0.5, "sparsity_structure": "2:4"}
    folder = written(llama, tmp_path / "packed", packed, ct_config(), sparsity_config=sparse)
    with pytest.raises(CheckpointError, match=r"stored sparsely .*sparse-24-bitmask"):
        logits(folder)


BESIDE = {"bits": 4, "group_size": 32, "desc_act": False, "sym": True}


@pytest.fixture
def old_gptq(llama, tmp_path):
    """As AutoGPTQ before 0.7 left it: nothing in config.json, a file beside, and a name of its own for the weights."""
    packed, _ = packed_tensors(llama, "gptq", is_projection)
    folder = written(llama, tmp_path / "old", packed, file="gptq_model-4bit-32g.safetensors")
    (folder / "quantize_config.json").write_text(json.dumps(BESIDE))
    return folder


def test_by_the_name_on_the_hub(old_gptq, llama, tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    commit, repository = "a" * 40, cache / "models--someone--Llama-GPTQ"
    shutil.copytree(old_gptq, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    lm = load("someone/Llama-GPTQ", llama)
    assert torch.equal(lm._model(TOKENS).logits, logits(old_gptq))
    assert lm.cell_record()["quantization"]["method"] == "gptq"


def test_shards_under_an_index_of_its_own(old_gptq):
    """AutoGPTQ named the index as the weights."""
    file = old_gptq / "gptq_model-4bit-32g.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), file.name)}
    before = logits(old_gptq)
    shutil.copyfile(file, old_gptq / "another.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files and no"):
        logits(old_gptq)
    (old_gptq / f"{file.name}.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(old_gptq), before)


def test_the_version_beside_a_config_without_one(llama, tmp_path):
    """transformers used to drop the version when it wrote config.json; GPTQModel's own file has it."""
    packed, plain = packed_tensors(llama, "gptq", is_projection, zero=8)
    folder = written(llama, tmp_path / "packed", packed, GPTQ)
    (folder / "quantize_config.json").write_text(json.dumps({**BESIDE, "checkpoint_format": "gptq_v2"}))
    assert torch.allclose(logits(folder), plain_logits(llama, tmp_path / "plain", plain), rtol=1e-4, atol=1e-4)


def test_act_order_that_the_config_does_not_say(llama, tmp_path):
    """The record says what the tensors have, and the reference is compared accordingly."""
    packed, _ = packed_tensors(llama, "gptq", is_projection)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for name in [name for name in packed if name.endswith("g_idx") and len(packed[name]) == 64]:
        packed[name] = packed[name][order]
    folder = written(llama, tmp_path / "packed", packed, GPTQ)
    lm = IntactKVLM(str(folder), pivot="none", dtype="float32", device="cpu")
    assert lm.cell_record()["quantization"]["act_order"] is True
