"""What models cache as keys and values, and how their keys are rotated: tried, against the models' own projections."""

import pytest
import torch
import transformers
from helpers.tiny import _SHAPE, BOS, build_model, uneven
from transformers import AutoModelForCausalLM

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.commands.kv_codebook import CodebookOptions, codebook_of_text
from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.kv_quant.latent import holds_latent
from intactkv_eval.kv_quant.quantizer import kv_quantizer_of
from intactkv_eval.kv_quant.rotary import find_rotary
from intactkv_eval.lm.intactkv_lm import IntactKVLM

KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
SLIDING = {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8, "v_head_dim": 16}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
           "n_group": 1, "topk_group": 1}  # fmt: skip
CHANNEL_KEY = KVSpec(bits=4, scheme="channel_key", group_size=4, residual_length=8)


def build(name, dtype=torch.float32, **more):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**_SHAPE, **more})
    return uneven(AutoModelForCausalLM.from_config(config).to(dtype).eval(), 0.1)


def cached_and_projected(model, ids, named):
    """Of each layer: the keys [B, H, T, D] in the cache, and what its module of that name made of them."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        for name, module in model.named_modules()
        if name.endswith(f".{named}")
    ]
    cache = CountingCache()
    with torch.no_grad():
        run_with_cache(model, cache, ids)
    for hook in hooks:
        hook.remove()
    keys = [layer.keys for layer in cache.layers]
    flat = [output.reshape(*ids.shape, -1).unflatten(-1, (rows.shape[1], -1)) for output, rows in
            zip(seen, keys, strict=False)]  # fmt: skip
    return keys, [output.transpose(1, 2) for output in flat]


ROTATIONS = {
    "cohere": ("CohereConfig", {}, "k_proj"),
    "cohere2": ("Cohere2Config", SLIDING, "k_proj"),
    "glm": ("GlmConfig", {"head_dim": 16}, "k_proj"),
    "glm4": ("Glm4Config", {"head_dim": 16}, "k_proj"),
    "ernie": ("Ernie4_5Config", {}, "k_proj"),
    "helium": ("HeliumConfig", {"head_dim": 16}, "k_proj"),
    "gpt_oss": ("GptOssConfig", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}, "k_proj"),
    "phi": ("PhiConfig", {}, "k_proj"),
    "stablelm": ("StableLmConfig", {"partial_rotary_factor": 0.25}, "k_proj"),
    "gemma4": ("Gemma4TextConfig", {**SLIDING, "global_head_dim": 32, "hidden_size_per_layer_input": 0,
                                    "num_kv_shared_layers": 0}, "k_norm"),
    "borrowed": ("Gemma4TextConfig", {**SLIDING, "global_head_dim": 32, "hidden_size_per_layer_input": 8,
                                      "vocab_size_per_layer_input": 259, "num_hidden_layers": 6,
                                      "layer_types": KINDS * 2, "num_kv_shared_layers": 3}, "k_norm"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(ROTATIONS))
def test_every_way_to_rotate_is_undone(case):
    name, more, named = ROTATIONS[case]
    model = build(name, **more)
    rotary = find_rotary(model)
    ids = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(1))
    keys, projected = cached_and_projected(model, ids, named)
    assert len(keys) == len(projected) == len(rotary.kinds) == 3
    for layer, (rows, expected) in enumerate(zip(keys, projected, strict=True)):
        turn = rotary.at(torch.arange(9)[None], layer, rows)
        torch.testing.assert_close(turn.undo(rows), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(turn.do(turn.undo(rows)), rows, rtol=1e-4, atol=1e-5)
        assert rotary.rotates[layer] == (not torch.allclose(rows, expected))
    assert sum(rotary.rotates) == (2 if case == "cohere2" else 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", sorted(ROTATIONS))
def test_ways_to_rotate_are_recognized_in_16_bits(case, dtype):
    name, more, _ = ROTATIONS[case]
    wide, narrow = find_rotary(build(name, **more)), find_rotary(build(name, dtype, **more))
    assert (wide.layout, wide.rotates) == (narrow.layout, narrow.rotates)


@pytest.mark.parametrize(("name", "more"), [("NanoChatConfig", {}), ("GPTJConfig", {"rotary_dim": 8})])
def test_models_that_turn_backwards_or_give_the_sine_first(name, more):
    model = build(name, **more)
    if not any(part.endswith("rotary_emb") for part, _ in model.named_modules()):
        with pytest.raises(UnsupportedModelError, match="has no module rotary_emb"):
            find_rotary(model)
        return
    rotary = find_rotary(model)
    keys, _ = cached_and_projected(model, torch.full((1, 9), 5), "nothing")
    turn = rotary.at(torch.arange(9)[None], 0, keys[0])
    assert rotary.rotates == (True, True, True)
    torch.testing.assert_close(turn.undo(keys[0]), keys[0][:, :, :1].expand_as(keys[0]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(turn.do(turn.undo(keys[0])), keys[0], rtol=1e-4, atol=1e-5)


def test_a_rotation_that_is_not_known_is_refused():
    model = build_model("llama")
    model.model.rotary_emb.register_forward_hook(lambda module, args, pair: (pair[0], pair[1].flip(-1)))
    find_rotary(model)  # the hook is there for both
    odd = model.model.layers[1].self_attn
    project = odd.k_proj.forward
    odd.k_proj.forward = lambda hidden: project(hidden) * torch.linspace(1, 2, hidden.shape[1])[:, None]
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM, layer 1: undoing its RoPE"):
        find_rotary(model)


def test_the_rotary_embedding_is_the_text_decoders():
    """Gemma 4's vision tower comes first and has one of the same name."""
    if not hasattr(transformers, "Gemma4Config"):
        pytest.skip("this transformers has no Gemma 4")
    text = {**_SHAPE, **SLIDING, "global_head_dim": 32, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}  # fmt: skip
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    torch.manual_seed(0)
    model = transformers.Gemma4ForConditionalGeneration(config).double().eval()
    names = [name for name, _ in model.named_modules() if name.endswith("rotary_emb")]
    assert any("vision" in name for name in names)
    rotary = find_rotary(model)
    assert rotary.module is next(part for name, part in model.named_modules() if "language" in name and name in names)
    assert rotary.rotates == (True, True, True)


MLA = {
    "deepseek_v2": ("DeepseekV2Config", {**LATENT, **EXPERTS}),
    "deepseek_v3": ("DeepseekV3Config", {**LATENT, **EXPERTS}),
    "not interleaved": ("DeepseekV3Config", {**LATENT, **EXPERTS, "rope_interleave": False}),
    "minicpm3": ("MiniCPM3Config", LATENT),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", {**LATENT, **EXPERTS}),
    "youtu": ("YoutuConfig", LATENT),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", sorted(MLA))
def test_a_latent_is_told_from_keys_and_values(case, dtype):
    """Releases of transformers differ in what of MLA they cache; a latent has one head and the width of its norm."""
    name, more = MLA[case]
    model = build(name, dtype, **more)
    keys, _ = cached_and_projected(model, torch.tensor([[1, 2, 3]]), "nothing")
    is_latent = keys[0].shape[1] == 1 and keys[0].shape[-1] == LATENT["kv_lora_rank"]
    assert holds_latent(model) == is_latent
    if not is_latent:
        assert kv_quantizer_of(CHANNEL_KEY, model) is not None
        return
    with pytest.raises(
        UnsupportedModelError, match=r"kv_scheme=channel_key .*latent row of 24 .*and 8 rotated numbers"
    ):
        kv_quantizer_of(CHANNEL_KEY, model)
    with pytest.raises(
        UnsupportedModelError, match=r"kv_scheme=pre_rope .*latent row of 24 .*use kv_scheme=token_head"
    ):
        find_rotary(model)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_models_hold_no_latent(family, dtype):
    assert not holds_latent(build_model(family, dtype=dtype))
    one_head = build("LlamaConfig", dtype, num_key_value_heads=1)
    assert not holds_latent(one_head)


def test_token_head_rounds_a_latent_and_the_record_says_so(tokenizer, tmp_path):
    model = build("MiniCPM3Config", torch.float32, **LATENT)
    lm = IntactKVLM(pretrained=model, tokenizer=tokenizer, pivot="bos", kv_bits=8)
    keys, _ = cached_and_projected(model, torch.tensor([[BOS, 2, 3]]), "nothing")
    assert lm.cell_record()["kv_cache_is_latent"] == (keys[0].shape[1] == 1)
    assert not IntactKVLM(pretrained=build_model("llama"), tokenizer=tokenizer).cell_record()["kv_cache_is_latent"]
    if keys[0].shape[1] > 1:
        return
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "levels.safetensors"
    text = tmp_path / "text.txt"
    text.write_text("The river rises in the hills and runs to the sea. " * 90)
    with pytest.raises(UnsupportedModelError, match="latent row"):
        codebook_of_text(
            {"pretrained": str(tmp_path / "model")},
            {"device": "cpu"},
            CodebookOptions(str(text), 4, samples=2, length=9),
            out,
        )
    assert not out.exists()
