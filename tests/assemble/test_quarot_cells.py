"""Rotated and activation-quantized cells: the pivot is in the model's basis, on the fly and from a checkpoint."""

import copy

import pytest
import torch
from helpers.tiny import BOS, build_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from intactkv_eval.cell.spec import ActivationSpec, KVSpec, WeightSpec
from intactkv_eval.errors import ConfigError, PivotError, UnsupportedModelError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.activation_quant import InputStage
from intactkv_eval.model.input_transforms import apply_input_transforms, input_transforms
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.export import export
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.quantize.rotation import rotate
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.report.collect import _checkpoint_label, identity_of
from intactkv_eval.report.labels import weights_label
from intactkv_eval.weights.formats.scheme import CheckpointScheme

PIVOT = (BOS, 7, 8)
BODY = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(3))
FP = {"dtype": "float32", "device": "cpu", "pivot": "tokens:256+7+8"}
W4 = {"weights": "rtn", "bits": 4, "group_size": -1, "symmetric": True}
A4 = {"act_bits": 4, "act_clip": 0.9}
KV4 = {"kv_bits": 4, "kv_rotate": True, "kv_clip": 0.95}
SPEC, KV = ActivationSpec(bits=4, clip=0.9), KVSpec(bits=4, rotate=True, clip=0.95)


def by_hand(model, weights, activations, turned, kv=None):
    """The cell put together step by step from a plain model, with its pivot."""
    pivot = capture(model, PIVOT, fingerprint_of(model, "main"))
    model = copy.deepcopy(model)
    rotation = rotate(model) if turned else None
    if weights is None:
        apply_input_transforms(model, rotation, activations)
    else:
        model = quantize_model(
            model, weights, stages=input_transforms(list(linear_layers(model)), rotation, activations)
        )
    return PivotedModel(model, PIVOT, to_rotated(pivot) if turned else pivot, kv)


@pytest.mark.parametrize("weights", [{}, W4])
@pytest.mark.parametrize("turned", [False, True])
def test_a_cell_is_its_parts(saved_llama, llama, weights, turned):
    arguments = {**FP, **weights, **A4, **({**KV4, "rotate": True} if turned else {})}
    lm = IntactKVLM(str(saved_llama), **arguments)
    spec = WeightSpec(method="rtn", bits=4, group_size=-1, symmetric=True, rotate=turned) if weights else None
    expected = by_hand(llama, spec, SPEC, turned, KV if turned else None)
    torch.testing.assert_close(lm.pivoted_model.body_logits(BODY), expected.body_logits(BODY))
    record = lm.cell_record()
    assert record["pivot_fingerprint"]["basis"] == ("hadamard" if turned else "plain")
    assert record["cell"]["activations"] == SPEC.model_dump()
    assert record["cell"]["weights"]["rotate"] is turned
    formula = ("quarot" if turned else "gptq") if weights else None
    assert record["symmetric_formula"] == formula
    assert weights_label(identity_of(record)).startswith(
        {None: "fp", "gptq": "rtn w4 sym a4", "quarot": "rtn w4 sym-quarot a4"}[formula]
    )
    plain = IntactKVLM(str(saved_llama), **FP)
    assert plain.pivoted_model.pivot.fingerprint.basis == "plain", "the store keeps the plain pivot"


def test_the_pivot_helps_in_the_right_basis_alone(saved_llama, llama):
    """The quantized rotated model with the pivot as it was captured is far from the one with it turned."""
    lm = IntactKVLM(str(saved_llama), **FP, **W4, rotate=True)
    right = lm.pivoted_model.body_logits(BODY)
    with torch.no_grad():
        full = llama(torch.cat([torch.tensor([PIVOT] * 2), BODY], dim=1)).logits[:, len(PIVOT) :]
    plain = capture(llama, PIVOT, fingerprint_of(llama, "main"))
    wrong = PivotedModel(lm.pivoted_model.model, PIVOT, plain).body_logits(BODY)
    assert (right - full).norm() < 0.8 * (wrong - full).norm()


def test_a_loaded_model_is_not_changed(llama, tokenizer):
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    modules = {name: type(module) for name, module in llama.named_modules()}
    for extra in ({"rotate": True}, {}):
        lm = IntactKVLM(llama, tokenizer=tokenizer, pivot="bos", device="cpu", **A4, **extra)
        assert any(isinstance(module, InputStage) for module in lm.pivoted_model.model.modules())
    assert {name: type(module) for name, module in llama.named_modules()} == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in llama.state_dict().items())


@pytest.fixture
def checkpoint(saved_llama, llama, tmp_path):
    """QuaRot RTN W4A4 of the saved llama."""
    model = copy.deepcopy(llama)
    rotation = rotate(model)
    layers = {name: quantize_rtn(layer.weight, 4, -1, "quarot", name) for name, layer in linear_layers(model).items()}
    others = {n: t for n, t in model.state_dict().items() if n.removesuffix(".weight") not in layers}
    scheme = CheckpointScheme(4, -1, True, "intactkv_eval:test rtn", ("lm_head",), SPEC, rotation)
    model.config.architectures = ["LlamaForCausalLM"]
    export(tmp_path / "quarot", "intactkv", scheme, model.config.to_diff_dict(), layers, others, saved_llama)
    return tmp_path / "quarot"


def test_a_checkpoint_is_the_cell_on_the_fly(checkpoint, saved_llama):
    packed = IntactKVLM(str(checkpoint), reference=str(saved_llama), **FP, **KV4)
    flying = IntactKVLM(str(saved_llama), **FP, **W4, **A4, **KV4, rotate=True)
    assert torch.equal(packed.pivoted_model.body_logits(BODY), flying.pivoted_model.body_logits(BODY))
    record = packed.cell_record()
    assert record["pivot_fingerprint"]["basis"] == "hadamard"
    assert 0.01 < record["basis_residual"] < 0.3
    assert _checkpoint_label(record) == "intactkv w4 sym a4 clip 0.9 rotated"


def test_a_pivot_file_is_turned_too_and_that_of_another_model_refused(checkpoint, llama, tmp_path):
    capture(llama, PIVOT, fingerprint_of(llama, "main")).save(tmp_path / "right.safetensors")
    lm = IntactKVLM(str(checkpoint), **{**FP, "pivot": str(tmp_path / "right.safetensors")})
    assert lm.pivoted_model.pivot.fingerprint.basis == "hadamard"
    other = build_model("llama", seed=9)
    capture(other, PIVOT, fingerprint_of(other, "main")).save(tmp_path / "wrong.safetensors")
    with pytest.raises(PivotError, match="does not belong to this model: their embeddings differ"):
        IntactKVLM(str(checkpoint), **{**FP, "pivot": str(tmp_path / "wrong.safetensors")})


def test_another_reference_is_refused_with_the_figure(checkpoint, llama, tokenizer, tmp_path):
    other = build_model("llama", seed=9)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(llama.model.embed_tokens.weight)
    other.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(PivotError, match=r"is not made from reference=.*v_proj of layer \d differs"):
        IntactKVLM(str(checkpoint), reference=str(tmp_path / "other"), **FP)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (A4, "act_bits: .*says itself how its activations are quantized"),
        ({"kv_bits": 4, "rotate": True}, "drop rotate"),
    ],
)
def test_a_checkpoint_is_not_staged_twice(checkpoint, saved_llama, extra, said):
    with pytest.raises(ConfigError, match=said):
        IntactKVLM(str(checkpoint), reference=str(saved_llama), **FP, **extra)


def test_activations_of_other_checkpoints_and_unrotatable_models(saved_llama, llama, tokenizer, tmp_path):
    layers = {name: quantize_rtn(layer.weight, 8, -1, "gptq") for name, layer in linear_layers(llama).items()}
    others = {n: t for n, t in llama.state_dict().items() if n.removesuffix(".weight") not in layers}
    llama.config.architectures = ["LlamaForCausalLM"]
    export(
        tmp_path / "gptq",
        "gptq",
        CheckpointScheme(8, -1, True, "x"),
        llama.config.to_diff_dict(),
        layers,
        others,
        saved_llama,
    )
    plain, coarse = (
        IntactKVLM(str(tmp_path / "gptq"), reference=str(saved_llama), **FP, **extra) for extra in ({}, A4)
    )
    assert coarse.pivoted_model.pivot.fingerprint.basis == "plain"
    one, other = (F.log_softmax(lm.pivoted_model.body_logits(BODY), dim=-1) for lm in (plain, coarse))
    assert 0.01 < (one - other).abs().mean() < 3
    build_model("gpt2").save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UnsupportedModelError, match="subtracts a mean"):
        IntactKVLM(str(tmp_path / "gpt2"), **FP, **W4, rotate=True)


def test_sixteen_bits(saved_llama, tokenizer, tmp_path):
    """The double rounding of V in bf16 is no more than rounding."""
    model = AutoModelForCausalLM.from_pretrained(saved_llama, dtype=torch.bfloat16)
    pivot = to_rotated(capture(model, PIVOT, fingerprint_of(model, "main")))
    apply_input_transforms(model, rotate(model), ActivationSpec())
    own = capture(model, PIVOT, fingerprint_of(model, "main"))
    for one, other in zip(pivot.values, own.values, strict=True):
        assert (one - other).norm() < 0.03 * other.norm()
    lm = IntactKVLM(str(saved_llama), **{**FP, "dtype": "bfloat16"}, **W4, **A4, rotate=True)
    assert torch.isfinite(lm.pivoted_model.body_logits(BODY)).all()
