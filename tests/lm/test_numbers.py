"""NaN and infinite numbers: no answer is made from them, and the message names where they first appear."""

import pytest
import torch
from helpers.kv_cells import levels_of
from helpers.tiny import BOS, build_model

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import IntactKVError, NumericsError, PivotError
from intactkv_eval.lm.intactkv_lm import IntactKVLM


def lm_of(model, tokenizer, **cell):
    return IntactKVLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu", **{"pivot": "none", **cell})


def requests(kind):
    if kind == "generate_until":
        texts = [("one two", {"max_gen_toks": 4, "until": []}), ("three", {"max_gen_toks": 4, "until": []})]
        return [make_request(kind, text, number) for number, text in enumerate(texts)]
    texts = [("one two", " three"), ("one two", " four"), ("five", " six")]
    return [make_request(kind, text, number) for number, text in enumerate(texts)]


def poison(model, name, value):
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.down_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"]
)
def test_a_broken_tensor_is_named(tokenizer, kind, value, name):
    model = build_model("llama")
    poison(model, name, value)
    lm = lm_of(model, tokenizer)
    wanted = "lm_head" if name.startswith("lm_head") else f"in {name}, a tensor of the model"
    with pytest.raises(NumericsError, match=wanted):
        getattr(lm, kind)(requests(kind))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_row_that_breaks_is_the_one_that_is_looked_at(tokenizer):
    """Not the first of its batch; and what it generated before it broke counts too."""
    model = build_model("llama")
    lm = lm_of(model, tokenizer)
    options = {"max_gen_toks": 4, "until": []}
    first = int(lm.pivoted_model.logits(torch.tensor([lm.tok_encode("aa b")]))[0, -1].argmax())
    for token, texts in ((lm.tok_encode("z")[0], ("aa b", "z z")), (first, ("aa b",))):
        held = model.model.embed_tokens.weight.detach().clone()
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = float("nan")
        with pytest.raises(NumericsError, match=r"in model\.embed_tokens\.weight"):
            lm.generate_until([make_request("generate_until", (text, options), 0) for text in texts])
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(held)


@pytest.mark.parametrize("kind", ["loglikelihood", "generate_until"])
@pytest.mark.parametrize("share", [True, False])
def test_an_overflow_in_fp16_is_named_with_the_way_out(tokenizer, kind, share):
    """What massive activations do: finite weights, a product beyond 65504."""
    model = build_model("llama", dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(60000)
        model.model.layers[1].mlp.up_proj.weight.mul_(1000)
    lm = lm_of(model, tokenizer, share_prefix=share)
    with pytest.raises(NumericsError, match=r"layers\.1\.mlp.*its input reaches.*use dtype=bfloat16"):
        getattr(lm, kind)(requests(kind))
    with pytest.raises(PivotError, match="bfloat16"):
        lm_of(model, tokenizer, pivot="bos")


def test_numbers_that_break_inside_attention_are_placed_there(tokenizer):
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(1e25)
        model.model.layers[1].self_attn.k_proj.weight.mul_(1e25)
    with pytest.raises(NumericsError, match=r"in front of model\.layers\.1\.self_attn\.o_proj: in attention"):
        lm_of(model, tokenizer).loglikelihood(requests("loglikelihood"))


def test_every_cell_refuses(tokenizer):
    """Weights are looked at before they are rounded; the cache's rounding carries what is broken on."""
    for cell in ({"weights": "rtn", "bits": 4, "group_size": 32}, {"act_bits": 8}, {"pivot": "bos"}):
        model = build_model("llama")
        poison(model, "model.layers.0.self_attn.k_proj.weight", float("nan"))
        with pytest.raises(IntactKVError, match=r"k_proj|hold NaN"):
            lm_of(model, tokenizer, **cell).loglikelihood(requests("loglikelihood"))


@pytest.mark.parametrize("scheme", ["token_head", "channel_key", "pre_rope"])
@pytest.mark.parametrize("name", ["k_proj", "v_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_scheme_of_the_cache_hides_them(tokenizer, tmp_path, scheme, name, value):
    """A level is found for NaN too; where it is hidden, the answer is a number like any other."""
    model, cell = build_model("llama"), {"kv_bits": 4, "kv_scheme": scheme}
    if scheme == "pre_rope":
        levels = levels_of(model, (BOS,), 0, 4)
        levels.save(tmp_path / "levels.safetensors")
        cell |= {"kv_codebook": str(tmp_path / "levels.safetensors")}
    lm = lm_of(model, tokenizer, **cell)
    poison(model, f"model.layers.1.self_attn.{name}.weight", value)
    with pytest.raises(NumericsError, match=rf"in model\.layers\.1\.self_attn\.{name}\.weight"):
        lm.loglikelihood(requests("loglikelihood"))


def test_whole_numbers_are_left_alone(tokenizer):
    lm = lm_of(build_model("llama"), tokenizer)
    assert all(torch.isfinite(torch.tensor(score)) for score, _ in lm.loglikelihood(requests("loglikelihood")))
    assert len(lm.generate_until(requests("generate_until"))) == 2
