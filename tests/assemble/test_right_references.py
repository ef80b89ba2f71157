"""Nothing that is right is refused: norms of zero or without weights, fused matrices, values in another basis."""

import copy

import pytest
import torch
from helpers.references import SHAPE, load, made, quantize, saved
from helpers.tiny import BOS, EOS, PAD, build_model
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MptConfig,
    OlmoConfig,
    OPTConfig,
    Phi3Config,
)

from intactkv_eval.assemble.awq_basis import read_layer
from intactkv_eval.errors import PivotError
from intactkv_eval.kv_quant.latent import holds_latent
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.weights.checkpoint import Checkpoint

FREE = {
    "olmo": OlmoConfig(**SHAPE),
    "opt": OPTConfig(
        vocab_size=259, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64,
        layer_norm_elementwise_affine=False, max_position_embeddings=128, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD, init_std=0.15,
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("family", sorted(FREE))
def test_norms_without_weights(tokenizer, tmp_path, family, layout):
    base = saved(made(FREE[family]), tmp_path / "base", tokenizer)
    lm = load(quantize(base, tmp_path / "out", "--format", layout), base)
    assert lm.cell_record()["pivot_fingerprint"]["basis"] == "plain"


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("dead", [1, 64])
def test_norm_weights_of_zero(tokenizer, tmp_path, layout, dead):
    model = build_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[:dead] = 0
    base = saved(model, tmp_path / "base", tokenizer)
    lm = load(quantize(base, tmp_path / "out", "--format", layout), base)
    plain_lm = IntactKVLM(str(base), pivot="bos", dtype="float32", device="cpu")
    pairs = zip(lm.pivoted_model.pivot.values, plain_lm.pivoted_model.pivot.values, strict=True)
    assert all(torch.allclose(found, right, rtol=0.05, atol=1e-3) for found, right in pairs)


MULTI_HEAD = {**SHAPE, "num_key_value_heads": 4}
FUSED = {
    "phi3": (Phi3Config(**MULTI_HEAD), "model.layers", "input_layernorm", "self_attn.qkv_proj", "self_attn.o_proj"),
    "llama": (LlamaConfig(**MULTI_HEAD), "model.layers", "input_layernorm", "self_attn.v_proj", "self_attn.o_proj"),
    "gpt2": (
        GPT2Config(vocab_size=259, n_positions=128, n_embd=64, n_layer=2, n_head=4, initializer_range=0.15),
        "transformer.h", "ln_1", "attn.c_attn", "attn.c_proj",
    ),
    "mpt": (
        MptConfig(vocab_size=259, d_model=64, n_layers=2, n_heads=4, max_seq_len=128, initializer_range=0.15),
        "transformer.blocks", "norm_1", "attn.Wqkv", "attn.out_proj",
    ),
    "neox": (GPTNeoXConfig(**MULTI_HEAD), "gpt_neox.layers", "input_layernorm", "attention.query_key_value", "attention.dense"),
}  # fmt: skip


def columns(layer):
    """The matrix [O, I] of a linear layer, as a view: GPT-2 keeps it transposed."""
    return layer.weight.t() if type(layer).__name__ == "Conv1D" else layer.weight


def value_rows(family, outputs):
    """Where V lies among the outputs."""
    rows = torch.arange(outputs)
    return rows[rows % 48 >= 32] if family == "neox" else rows[-64:]


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_values_are_found_in_fused_matrices_and_brought_into_their_basis(tokenizer, tmp_path, family, scaled):
    """AutoAWQ divides the last outputs of Phi-3's qkv_proj and MPT's Wqkv, as of v_proj: V's rows, wherever they lie."""
    config, layers, norm, value, output = FUSED[family]
    model = made(config)
    base = saved(model, tmp_path / "base", tokenizer)
    folded = copy.deepcopy(model)
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in folded.get_submodule(layers) if scaled else ():
            front, back = layer.get_submodule(value), layer.get_submodule(output)
            s, t = torch.exp(0.5 * torch.randn(64)), torch.exp(0.5 * torch.randn(64))
            rows = value_rows(family, columns(front).shape[0])
            for part in layer.get_submodule(norm).parameters():
                part.div_(s)
            columns(front).mul_(s)
            columns(front)[rows] /= t[:, None]
            if front.bias is not None:
                front.bias[rows] /= t
            columns(back).mul_(t)
    exact = capture(folded, (BOS,), fingerprint_of(folded, "main"))
    whole = capture(model, (BOS,), fingerprint_of(model, "main"))
    torch.testing.assert_close(exact.logits, whole.logits, rtol=1e-3, atol=1e-3)
    lm = load(quantize(saved(folded, tmp_path / "folded", tokenizer), tmp_path / "out", "--format", "awq"), base)
    found = lm.pivoted_model.pivot
    assert found.fingerprint.basis.startswith("awq:" if scaled else "plain")
    for layer in range(2):
        error = (found.values[layer] - exact.values[layer]).norm() / exact.values[layer].norm()
        assert error < 0.05
        unconverted = (whole.values[layer] - exact.values[layer]).norm() / exact.values[layer].norm()
        assert bool(unconverted > 0.2) is scaled


@pytest.mark.parametrize("method", ["awq", "omniquant"])
def test_phi3_by_methods_that_scale(tokenizer, tmp_path, method):
    """Ours leave V of a fused matrix alone, whose values then are in the plain basis."""
    base = saved(build_model("phi3"), tmp_path / "base", tokenizer)
    text = tmp_path / "prose.txt"
    text.write_text("some words of prose that are here " * 60)
    more = ["-o", "epochs=1"] if method == "omniquant" else []
    data = ["--data", text, "--samples", 2, "--length", 24, "--format", "compressed-tensors"]
    lm = load(quantize(base, tmp_path / "out", "--method", method, *data, *more), base)
    assert lm.cell_record()["pivot_fingerprint"]["basis"] == "plain"


def test_latent_attention(tokenizer, tmp_path):
    """MLA caches what a norm gives out: nothing scaled is accepted, and a scale, which nobody could bring over, is not."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 32, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32}
    model = made(DeepseekV2Config(**{**MULTI_HEAD, **latent}, first_k_dense_replace=2))
    base = saved(model, tmp_path / "base", tokenizer)
    out = quantize(base, tmp_path / "out", "--format", "compressed-tensors")
    assert load(out, base, share_prefix=False).cell_record()["pivot_fingerprint"]["basis"] == "plain"
    with torch.no_grad():
        for layer in model.model.layers:
            s = torch.exp(0.5 * torch.randn(32))
            layer.self_attn.kv_a_layernorm.weight.div_(s)
            layer.self_attn.kv_b_proj.weight.mul_(s)
    scaled = quantize(
        saved(model, tmp_path / "scaled", tokenizer), tmp_path / "of-scaled", "--format", "compressed-tensors"
    )
    if not holds_latent(model):  # transformers 5.0 caches the values behind the second matrix, which are as they were
        kept, plain = (load(one, base, share_prefix=False).pivoted_model.pivot.values for one in (scaled, out))
        assert all((one - other).norm() < 0.1 * other.norm() for one, other in zip(kept, plain, strict=True))
        return
    with pytest.raises(PivotError, match="are no outputs of one of its matrices"):
        load(scaled, base, share_prefix=False)


def test_a_scale_where_no_writer_scales_is_refused(tokenizer, tmp_path):
    """GPTQ's format says that nothing was scaled; a model that was is no copy of the reference."""
    model = made(LlamaConfig(**MULTI_HEAD))
    base = saved(model, tmp_path / "base", tokenizer)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(3)
            layer.self_attn.o_proj.weight.div_(3)
    out = quantize(saved(model, tmp_path / "scaled", tokenizer), tmp_path / "out")
    with pytest.raises(PivotError, match=r"self_attn\.[vo]_proj\.weight differs from the reference's by"):
        load(out, base)


def test_a_layers_tensors_by_any_name_before_the_list_of_layers(tmp_path):
    """Wrappers were saved as `language_model.model.layers`, base models as `layers`; towers have layers of their own."""
    wanted = ["self_attn.v_proj.weight", "input_layernorm.weight"]
    tower = {"vision_tower.encoder.layers.1.self_attn.v_proj.weight": torch.zeros(2)}
    for place, stem in enumerate(("model.language_model.layers", "language_model.model.layers", "layers")):
        folder = tmp_path / str(place)
        folder.mkdir()
        own = {f"{stem}.1.{name}": torch.full((2,), 7.0) for name in wanted}
        save_file({**tower, **own, f"{stem}.11.{wanted[0]}": torch.zeros(2)}, folder / "model.safetensors")
        found = read_layer(Checkpoint(folder), "model.language_model.layers", 1, wanted)
        assert [tensor.tolist() for tensor in found] == [[7, 7], [7, 7]]
    with pytest.raises(PivotError, match=r"expected one list of layers with self_attn\.q_proj\.weight, found none"):
        read_layer(Checkpoint(folder), "model.layers", 1, ["self_attn.q_proj.weight"])
    both = {f"{stem}.layers.1.{name}": torch.ones(2) for stem in ("a", "b") for name in wanted}
    save_file(both, folder / "model.safetensors")
    with pytest.raises(PivotError, match=r"found several: a\.layers, b\.layers"):
        read_layer(Checkpoint(folder), "model.layers", 1, wanted)
