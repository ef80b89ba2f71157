"""Models of other kinds: each is computed as transformers does, or refused with what it truly is."""

import pytest
import torch
import transformers
from helpers.tiny import _SHAPE, build_model, uneven
from transformers import CONFIG_MAPPING

from intactkv_eval.assemble.load_errors import auto_class_of, loading
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import ConfigError, UnsupportedModelError
from intactkv_eval.inference.causality import check_causal
from intactkv_eval.lm.intactkv_lm import IntactKVLM

FOUR = {**_SHAPE, "num_hidden_layers": 4}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
          "layer_types": ["linear_attention"] * 3 + ["full_attention"], "head_dim": 16}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 8}
ALONE = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 256, "eos_token_id": 257,
         "pad_token_id": 258}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
          "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
          "first_k_dense_replace": 1, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "index_n_heads": 2,
          "index_head_dim": 16, "index_topk": 4}  # fmt: skip
HYBRID = r"is a hybrid model: .*Its pivot would be these states and .*pivot=none included; use --model hf"
NO_ATTENTION = r"has no attention: .*There are no keys and values to keep intact.*use --model hf"
REFUSED = {
    "qwen3_next": ({**FOUR, **LINEAR, "num_experts": 4, "moe_intermediate_size": 16,
                    "shared_expert_intermediate_size": 16}, r"3 of its 4 layers \(linear_attention\).*other 1"),
    "jamba": ({**FOUR, "attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 2, "mamba_d_state": 8,
               "use_mamba_kernels": False}, r"3 of its 4 layers .*a recurrent state"),
    "lfm2": ({**FOUR, "layer_types": ["conv", "conv", "full_attention", "conv"]}, r"last inputs of a convolution"),
    "recurrent_gemma": ({**_SHAPE, "lru_width": 64, "attention_window_size": 16,
                         "block_types": ["recurrent", "recurrent", "attention"]}, r"2 of its 3 layers"),
    "granitemoehybrid": ({**FOUR, **MAMBA, "layer_types": ["mamba"] * 3 + ["attention"], "num_local_experts": 0,
                          "shared_intermediate_size": 64}, r"3 of its 4 layers"),
    "mamba": ({**ALONE, "state_size": 8}, NO_ATTENTION),
    "mamba2": ({**ALONE, "state_size": 8, "num_heads": 4, "head_dim": 32, "n_groups": 1}, NO_ATTENTION),
    "rwkv": ({**ALONE, "attention_hidden_size": 64}, NO_ATTENTION),
    "llama4_text": ({**FOUR, "head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 96,
                     "attention_chunk_size": 16},
                    r"has another attention: 3 of its 4 layers \(chunked_attention\) .*one chunk of positions alone \(16"),
    "deepseek_v32": ({**_SHAPE, **LATENT}, r"has another attention: all its 3 layers \(indexed_attention\)"),
    "glm_moe_dsa": ({**_SHAPE, **LATENT}, r"has another attention: .*an indexer picks"),
}  # fmt: skip


def built(auto, model_type, **settings):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    torch.manual_seed(0)
    return uneven(auto.from_config(CONFIG_MAPPING[model_type](**settings)).float().eval(), 0.1)


@pytest.mark.parametrize("pivot", ["none", "bos"])
@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_a_model_is_stands_in_its_refusal(tokenizer, model_type, pivot):
    settings, said = REFUSED[model_type]
    model = built(transformers.AutoModelForCausalLM, model_type, **settings)
    with pytest.raises(UnsupportedModelError, match=said) as raised:
        IntactKVLM(pretrained=model, tokenizer=tokenizer, pivot=pivot)
    text = str(raised.value)
    assert text.startswith(f"{type(model).__name__} ({model_type})")
    assert "use --model hf" in text
    assert "state-space or hybrid" not in text


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_encoder_decoders_are_refused(tokenizer, tmp_path, model_type):
    settings = {"t5": {"vocab_size": 259, "d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4,
                       "decoder_start_token_id": 258},
                "bart": {"vocab_size": 259, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
                         "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 4,
                         "decoder_attention_heads": 4}}[model_type]  # fmt: skip
    built(transformers.AutoModelForSeq2SeqLM, model_type, **settings).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"encoder-decoder: it reads a text with its encoder.*--model hf"):
        IntactKVLM(str(tmp_path), pivot="none", device="cpu")


TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
         "patch_size": 8}  # fmt: skip
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
WRAPPERS = {
    "llava": lambda: {"text_config": CONFIG_MAPPING["llama"](**_SHAPE),
                      "vision_config": CONFIG_MAPPING["clip_vision_model"](**TOWER)},
    "mistral3": lambda: {"text_config": CONFIG_MAPPING["mistral"](**_SHAPE),
                         "vision_config": CONFIG_MAPPING["pixtral"](**TOWER, head_dim=16)},
    "qwen2_vl": lambda: {"text_config": {**_SHAPE, **SECTIONS},
                         "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2,
                                           "patch_size": 8}},
    "qwen3_vl": lambda: {"text_config": {**_SHAPE, **SECTIONS, "head_dim": 16},
                         "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                                           "patch_size": 8, "intermediate_size": 48, "deepstack_visual_indexes": [0]}},
    "gemma3": lambda: {"text_config": {**_SHAPE, "head_dim": 16, "sliding_window": 8}, "vision_config": TOWER},
}  # fmt: skip
PAIRS = [("The quick brown fox", " jumps"), ("Hello", " you there"), ("The quick brown fox", " is")]


@torch.no_grad()
def plain(model, tokenizer, pairs):
    found = []
    for context, continuation in pairs:
        whole = torch.tensor([[256, *tokenizer.encode(context + continuation)]])
        logits = model(input_ids=whole).logits[0].double().log_softmax(-1)
        found.append(float(logits[:-1].gather(1, whole[0, 1:, None])[-len(tokenizer.encode(continuation)) :].sum()))
    return found


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
def test_a_language_model_beside_a_vision_tower_is_evaluated_on_text(tokenizer, tmp_path, model_type):
    model = built(transformers.AutoModelForImageTextToText, model_type, **WRAPPERS[model_type]())
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = plain(model, tokenizer, PAIRS)
    ids = torch.tensor([[256, *tokenizer.encode("ab cd")]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[
        0, ids.shape[1] :
    ]
    for cell in ({"pivot": "none"}, {"pivot": "bos", "batch_size": 3}, {"pivot": "bos", "share_prefix": False}):
        lm = IntactKVLM(str(tmp_path), dtype="float32", device="cpu", **cell)
        found = lm.loglikelihood([make_request("loglikelihood", pair) for pair in PAIRS], disable_tqdm=True)
        assert [one for one, _ in found] == pytest.approx(expected, abs=1e-4), cell
        options = {"until": [], "do_sample": False, "max_gen_toks": 6}
        (text,) = lm.generate_until([make_request("generate_until", ("ab cd", options))], disable_tqdm=True)
        assert text == tokenizer.decode(made, skip_special_tokens=True), cell


def test_layers_that_attend_to_images_hold_no_pivot(tokenizer):
    settings = {
        "text_config": {**FOUR, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "vision_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
                          "attention_heads": 2, "image_size": 16, "patch_size": 8, "max_num_tiles": 1,
                          "supported_aspect_ratios": [[1, 1]], "vision_output_dim": 64,
                          "intermediate_layers_indices": [0]},
    }  # fmt: skip
    model = built(transformers.AutoModelForImageTextToText, "mllama", **settings)
    lm = IntactKVLM(pretrained=model, tokenizer=tokenizer, pivot="none")
    found = lm.loglikelihood([make_request("loglikelihood", PAIRS[0])], disable_tqdm=True)
    assert found[0][0] == pytest.approx(plain(model, tokenizer, PAIRS[:1])[0], abs=1e-4)
    request = make_request("loglikelihood", PAIRS[0])
    for cell in ({"pivot": "bos"}, {"pivot": "none", "kv_bits": 4}):
        with pytest.raises(
            UnsupportedModelError, match=r"layers \[1\] attend to images alone .*pivot=none without kv_b"
        ):
            IntactKVLM(pretrained=model, tokenizer=tokenizer, **cell).loglikelihood([request], disable_tqdm=True)


def test_an_encoder_is_refused_and_a_decoder_of_its_class_is_not(tokenizer):
    settings = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
                "num_attention_heads": 4, "initializer_range": 0.15}  # fmt: skip
    encoder = built(transformers.AutoModelForCausalLM, "bert", **settings)
    with pytest.raises(UnsupportedModelError, match=r"BertLMHeadModel \(bert\) is not causal: .*is_decoder=true"):
        IntactKVLM(pretrained=encoder, tokenizer=tokenizer, pivot="none")
    check_causal(built(transformers.AutoModelForCausalLM, "bert", **settings, is_decoder=True))
    for family in ("llama", "gpt2"):
        check_causal(build_model(family))


def test_what_is_no_language_model_is_named_without_a_list_of_all_others(tmp_path):
    config = CONFIG_MAPPING["clip_vision_model"](**TOWER)
    with pytest.raises(UnsupportedModelError, match="of type clip_vision_model, which transformers does not load as"):
        auto_class_of("folder", config)
    assert auto_class_of("folder", CONFIG_MAPPING["llama"](**_SHAPE)) is None
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="Unrecognized configuration class") as raised, loading("reference"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(str(raised.value)) < 300
