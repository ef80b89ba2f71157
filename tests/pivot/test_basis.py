"""AWQ scales V where v_proj and o_proj have equal shapes: law 1 holds after basis conversion, and fails without it."""

import copy
import json

import pytest
import torch
from helpers.tiny import BOS, build_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from intactkv_eval.assemble.awq_basis import in_basis_of
from intactkv_eval.cli.main import app
from intactkv_eval.errors import CheckpointError, PivotError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.basis import to_basis
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.awq_search import apply_scales, check_clips, clipped, load_search

WIDTH = 256  # wide enough for least squares over a row
PIVOT = (BOS, 7, 8)
BODY = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))


def multi_head_llama(seed=0, kv_heads=4):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=128, bos_token_id=BOS, eos_token_id=257, pad_token_id=258,
        initializer_range=0.08,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def search_result(model, path, seed=5):
    """What llm-awq's search writes for a Llama: scales for each of its four places, clips for all but q and k."""
    generator = torch.Generator().manual_seed(seed)

    def scale(width):
        return torch.exp(0.7 * torch.randn(width, generator=generator))

    scales, clips = [], []
    for index, layer in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        scales.append((f"{name}.input_layernorm", tuple(f"{attention}.{part}_proj" for part in "qkv"), scale(WIDTH)))
        if layer.self_attn.v_proj.weight.shape == layer.self_attn.o_proj.weight.shape:
            scales.append((f"{attention}.v_proj", (f"{attention}.o_proj",), scale(WIDTH)))
        scales.append((f"{name}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"), scale(WIDTH)))
        scales.append((f"{mlp}.up_proj", (f"{mlp}.down_proj",), scale(256)))
        clips.append((f"{mlp}.down_proj", torch.full((WIDTH, 256 // 64, 1), 0.2)))
    torch.save({"scale": scales, "clip": clips}, path)
    return path


@pytest.fixture
def reference():
    return multi_head_llama()


@pytest.fixture
def scaled(reference, tmp_path):
    """The reference with AWQ's scales folded in: the same function."""
    model = copy.deepcopy(reference)
    apply_scales(model, load_search(search_result(reference, tmp_path / "search.pt")))
    return model


def logits(model, pivot):
    return PivotedModel(model, PIVOT, pivot).body_logits(BODY)


def plain(model):
    with torch.no_grad():
        return model(torch.cat([torch.tensor([PIVOT] * 2), BODY], dim=1)).logits[:, len(PIVOT) :]


def test_scaling_is_no_change_of_function(reference, scaled):
    torch.testing.assert_close(plain(scaled), plain(reference), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(
        scaled.model.layers[0].self_attn.v_proj.weight, reference.model.layers[0].self_attn.v_proj.weight
    )


def test_law_1_after_conversion_and_not_without(reference, scaled):
    """By the exact scale: the converted pivot is what the scaled model itself would have captured."""
    pivot = capture(reference, PIVOT, fingerprint_of(reference, "main"))
    own = capture(scaled, PIVOT, fingerprint_of(scaled, "main"))
    ratios = [own.values[layer][:, 0].flatten() / pivot.values[layer][:, 0].flatten() for layer in range(3)]
    converted = to_basis(pivot, ratios)
    torch.testing.assert_close(logits(scaled, converted), plain(reference), rtol=1e-3, atol=1e-3)
    error = (logits(scaled, pivot) - plain(reference)).norm() / plain(reference).norm()
    assert error > 0.05
    assert converted.fingerprint.basis.startswith("awq:")
    assert all(torch.equal(one, other) for one, other in zip(converted.keys, pivot.keys, strict=True))


@pytest.fixture
def folders(reference, scaled, tokenizer, tmp_path):
    """The reference, and an AWQ checkpoint of it: scaled, then 4 bits in AWQ's layout."""
    for name, model in (("reference", reference), ("scaled", scaled)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    done = CliRunner().invoke(app, ["quantize", str(tmp_path / "scaled"), "--out", str(tmp_path / "awq"), "--format", "awq", "--group-size", "64"])  # fmt: skip
    assert done.exit_code == 0, done.output
    return tmp_path


def test_law_1_with_the_scale_recovered_from_the_checkpoint(reference, scaled, folders):
    """The quantized model with the recovered basis, against the same with the exact one; and against none."""
    lm = IntactKVLM(str(folders / "awq"), reference=str(folders / "reference"), pivot="tokens:256+7+8", dtype="float32", device="cpu")  # fmt: skip
    quantized, found = lm.pivoted_model.model, lm.pivoted_model.pivot
    exact = capture(scaled, PIVOT, fingerprint_of(scaled, "main"))
    unconverted = capture(reference, PIVOT, fingerprint_of(reference, "main"))
    for layer in range(3):
        assert (found.values[layer] - exact.values[layer]).norm() < 0.02 * exact.values[layer].norm()
    right = logits(quantized, exact)
    near = (logits(quantized, found) - right).norm() / right.norm()
    far = (logits(quantized, unconverted) - right).norm() / right.norm()
    assert near < 0.01
    assert far > 5 * near
    assert far > 0.05
    # In the scaled model before rounding, law 1 itself: what is left is the error of the recovery.
    law = (logits(scaled, found) - plain(reference)).norm() / plain(reference).norm()
    assert law < 0.01
    record = lm.cell_record()
    assert record["pivot_fingerprint"]["basis"].startswith("awq:")
    assert 0.01 < record["basis_residual"] < 0.2


def test_another_reference_is_refused_with_the_figure(folders, tokenizer):
    other = multi_head_llama(seed=9)
    with torch.no_grad():  # the embeddings agree, so that only the residual can tell
        other.model.embed_tokens.weight.copy_(multi_head_llama().model.embed_tokens.weight)
    other.save_pretrained(folders / "other")
    tokenizer.save_pretrained(folders / "other")
    with pytest.raises(PivotError, match=r"is not made from reference=.*differs from the reference's by (0\.9|1\.0)"):
        IntactKVLM(str(folders / "awq"), reference=str(folders / "other"), pivot="bos", dtype="float32", device="cpu")


def test_a_pivot_file_does_not_tell_the_scale(folders):
    file = folders / "pivot.safetensors"
    model = AutoModelForCausalLM.from_pretrained(folders / "reference")
    capture(model, (BOS,), fingerprint_of(model, "main")).save(file)
    with pytest.raises(PivotError, match="may have V scaled: name the full-precision model"):
        IntactKVLM(str(folders / "awq"), pivot=str(file), dtype="float32", device="cpu")


def test_unscaled_checkpoints_keep_the_plain_basis(reference, folders):
    """GPTQ and compressed-tensors of the reference itself: nothing is converted, but the residual is checked."""
    for layout in ("gptq", "compressed-tensors"):
        out = folders / layout
        CliRunner().invoke(app, ["quantize", str(folders / "reference"), "--out", str(out), "--format", layout, "--group-size", "64"])  # fmt: skip
        lm = IntactKVLM(str(out), reference=str(folders / "reference"), pivot="bos", dtype="float32", device="cpu")
        assert lm.pivoted_model.pivot.fingerprint.basis == "plain"
        assert 0.01 < lm.cell_record()["basis_residual"] < 0.2


def test_grouped_kv_heads_are_not_scaled(tokenizer, tmp_path):
    model = multi_head_llama(kv_heads=2)
    search = load_search(search_result(model, tmp_path / "s.pt"))
    scaled = copy.deepcopy(model)
    apply_scales(scaled, search)
    model.save_pretrained(tmp_path / "reference")
    pivot = capture(model, PIVOT, fingerprint_of(model, "main"))
    found, residual = in_basis_of(pivot, scaled, "awq", "awq", str(tmp_path / "reference"))
    assert found.fingerprint.basis == "plain"
    assert residual < 1e-3
    torch.testing.assert_close(logits(scaled, found), plain(model), rtol=1e-3, atol=1e-3)


def test_search_results_are_applied_on_the_fly(folders):
    """weights=awq: scaled, captured, clipped, rounded. The pivot is captured in the scaled basis."""
    common = {"dtype": "float32", "device": "cpu", "weights": "awq", "bits": 4, "group_size": 64, "awq_search": str(folders / "search.pt")}  # fmt: skip
    lm = IntactKVLM(str(folders / "reference"), pivot="tokens:256+7+8", **common)
    scaled = AutoModelForCausalLM.from_pretrained(folders / "scaled")
    own = capture(scaled, PIVOT, fingerprint_of(scaled, "main"))
    for layer in range(3):
        torch.testing.assert_close(lm.pivoted_model.pivot.values[layer], own.values[layer], rtol=1e-3, atol=1e-4)
    down = lm.pivoted_model.model.model.layers[0].mlp.down_proj.weight
    assert down.abs().max() <= 0.2 * (1 + 1 / 15) + 1e-4  # half a step more, by the rounding of the zero
    assert scaled.model.layers[0].mlp.down_proj.weight.abs().max() > 0.25
    assert lm.cell_record()["pivot_fingerprint"]["basis"].startswith("awq-search:")
    assert lm.cell_record()["awq_search"] == load_search(folders / "search.pt").digest
    again = IntactKVLM(str(folders / "reference"), pivot="tokens:256+7+8", dtype="float32", device="cpu")
    assert again.pivoted_model.pivot.fingerprint.basis == "plain"  # the store keeps the two apart


def test_bad_search_results(reference, tmp_path):
    file = tmp_path / "bad.pt"
    file.write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match="cannot be read as llm-awq's search result"):
        load_search(file)
    torch.save(build_model, file)  # code, not data
    with pytest.raises(CheckpointError, match="cannot be read as llm-awq's search result"):
        load_search(file)
    torch.save({"clip": []}, file)
    with pytest.raises(CheckpointError, match="expected the lists `scale` and `clip` of llm-awq"):
        load_search(file)
    torch.save({"scale": [("model.norms", ("lm_head",), torch.ones(WIDTH))], "clip": []}, file)
    with pytest.raises(CheckpointError, match=r"model\.norms is no module"):
        apply_scales(reference, load_search(file))
    torch.save({"scale": [("model.norm", ("lm_head",), torch.ones(8))], "clip": []}, file)
    with pytest.raises(CheckpointError, match="lm_head should be a linear layer of 8 inputs"):
        apply_scales(reference, load_search(file))
    torch.save({"scale": [], "clip": [("model.layers.0.mlp", torch.ones(1, 1, 1))]}, file)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp, which it clips, is no linear layer"):
        check_clips(load_search(file), linear_layers(reference))
    torch.save({"scale": [], "clip": [("lm_head", torch.ones(1, 1, 1))]}, file)
    with pytest.raises(CheckpointError, match="lm_head, which it clips, is no linear layer that is quantized"):
        check_clips(load_search(file), linear_layers(reference))
    with pytest.raises(CheckpointError, match="do not fit a matrix"):
        clipped(torch.ones(4, 8), torch.ones(3, 2))


def test_a_checkpoint_with_a_norm_of_zeros_is_no_basis(folders):
    file = folders / "awq" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"].zero_()
    save_file(tensors, file)
    assert json.loads((folders / "awq" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    with pytest.raises(PivotError, match=r"v_proj of layer 1 differs from the reference's by (inf|nan)"):
        IntactKVLM(
            str(folders / "awq"), reference=str(folders / "reference"), pivot="bos", dtype="float32", device="cpu"
        )
