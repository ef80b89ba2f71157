"""Law 18: a model that is handed over as an object is treated as its folder is."""

import copy

import pytest
import torch
from helpers.object_models import RTN, SEVERAL, answers, of_folder, of_object, rounded, save, scores, values
from helpers.tiny import build_model, byte_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.errors import CheckpointError, ConfigError, IntactKVError, PivotError, UnsupportedModelError
from intactkv_eval.lm.intactkv_lm import IntactKVLM

# ---- the reference ----


@pytest.mark.parametrize("cell", [{"pivot": "bos"}, SEVERAL, {"pivot": "bos", "kv_bits": 4}], ids=str)
def test_the_pivot_is_the_references(llama, saved_llama, tmp_path, cell):
    quantized = rounded(llama)
    lm = of_object(quantized, reference=str(saved_llama), **cell)
    tokens = lm.pivoted_model.token_ids
    torch.testing.assert_close(lm.pivoted_model.pivot.values[1], values(llama, tokens))
    assert not torch.allclose(lm.pivoted_model.pivot.values[1], values(quantized, tokens), atol=1e-2)
    folder = of_folder(save(quantized, tmp_path / "quantized"), reference=str(saved_llama), **cell)
    assert scores(lm) == pytest.approx(scores(folder), abs=1e-5)
    assert scores(of_object(quantized, reference=llama, **cell)) == pytest.approx(scores(folder), abs=1e-5)
    assert scores(of_object(quantized, **cell)) != pytest.approx(scores(folder), abs=1e-2)
    assert lm.cell_record()["handed_over"]["pivot_is_its_own"] is False
    assert of_object(quantized, **cell).cell_record()["handed_over"]["pivot_is_its_own"] is True


def test_a_folder_beside_a_reference_that_is_an_object(llama, saved_llama, tmp_path):
    folder = save(rounded(llama), tmp_path / "quantized")
    by_name = of_folder(folder, reference=str(saved_llama))
    by_object = of_folder(folder, reference=llama)
    assert scores(by_object) == pytest.approx(scores(by_name), abs=1e-5)
    assert by_object.cell_record()["handed_over"]["in-memory reference"]["class"].endswith("LlamaForCausalLM")


def test_another_reference_is_refused_as_it_is_for_a_folder(llama, tmp_path):
    other = build_model("llama", seed=9)
    folder = save(other, tmp_path / "other")
    for reference in (str(folder), other):
        with pytest.raises(PivotError, match=r"is not made from reference=.*cosine"):
            of_object(rounded(llama), reference=reference)
    with pytest.raises(ConfigError, match=r"reference='/no/such/model' cannot be loaded"):
        of_object(llama, reference="/no/such/model")
    with pytest.raises(PivotError, match="its dtype is bfloat16, expected float32"):
        of_object(llama, reference=copy.deepcopy(llama).bfloat16())
    with pytest.raises(ConfigError, match="reference: an object of the class Linear"):
        of_object(llama, reference=nn.Linear(2, 2))


def test_the_reference_is_loaded_in_the_objects_dtype(llama, saved_llama):
    model = AutoModelForCausalLM.from_pretrained(saved_llama, dtype=torch.bfloat16)
    lm = of_object(model, reference=str(saved_llama))
    assert lm.pivoted_model.pivot.keys[0].dtype == torch.bfloat16
    assert lm.cell_record()["cell"]["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("way", [["--format", "compressed-tensors"], ["--rotate"], []], ids=" ".join)
def test_packed_layers_keep_the_format_that_they_were_read_from(llama, saved_llama, tmp_path, way):
    """V may be scaled or rotated in such a model, and the pivot of its reference is brought into that basis."""
    out = tmp_path / "packed"
    done = CliRunner().invoke(app, ["quantize", str(saved_llama), "--out", str(out), "--group-size", "32", *way])
    assert done.exit_code == 0, done.output
    folder = of_folder(out, reference=str(saved_llama), **SEVERAL)
    model = copy.deepcopy(of_folder(out, pivot="none").model)
    for reference in (str(saved_llama), llama):
        lm = of_object(model, reference=reference, **SEVERAL)
        assert scores(lm) == pytest.approx(scores(folder), abs=1e-5)
        assert lm.cell_record()["basis_residual"] == pytest.approx(folder.cell_record()["basis_residual"])
        assert lm.cell_record()["quantization"] == folder.cell_record()["quantization"]
    with pytest.raises(PivotError, match="itself quantized"):
        of_object(llama, reference=model)
    with pytest.raises(PivotError, match="is quantized"):
        of_object(model)
    with pytest.raises(ConfigError, match="backend=dense: does nothing to a model that was handed over"):
        of_object(model, pivot="none", backend="dense")


def test_layers_that_were_quantized_by_hand_are_no_full_precision_model(llama, saved_llama):
    """No config says so: the layers hold codes, and a pivot of their own would be taken for an intact one."""

    class CodesLinear(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.in_features, self.out_features = layer.in_features, layer.out_features
            self.scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
            self.register_buffer("codes", (layer.weight.detach() / self.scale).round().to(torch.int8))

        def forward(self, x):
            return x @ (self.codes * self.scale).T

    for layer in llama.model.layers:
        layer.mlp.up_proj = CodesLinear(layer.mlp.up_proj)
    with pytest.raises(PivotError, match=r"is quantized \(layers of CodesLinear\)"):
        of_object(llama)
    lm = of_object(llama, reference=str(saved_llama))
    torch.testing.assert_close(lm.pivoted_model.pivot.values[0], of_folder(saved_llama).pivoted_model.pivot.values[0])


# ---- cells that change the model ----


@pytest.mark.parametrize("cell", [RTN, {**RTN, "act_bits": 8}, {**RTN, "rotate": True}, {"kv_bits": 4}], ids=str)
def test_a_cell_of_an_object_is_that_of_its_folder_and_leaves_it_as_it_was(llama, saved_llama, cell):
    before = copy.deepcopy(llama.state_dict())
    assert scores(of_object(llama, **cell)) == pytest.approx(scores(of_folder(saved_llama, **cell)), abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())


class OfItsOwn(LlamaForCausalLM):
    """A class of a user's, which is not built from a config alone."""

    def __init__(self, config, note):
        super().__init__(config)
        self.note = note


def test_a_class_of_the_users_and_changed_modules_are_quantized_as_they_are(llama):
    model = OfItsOwn(llama.config, "mine").eval()
    model.load_state_dict(llama.state_dict())
    for cell in (RTN, {**RTN, "rotate": True}):
        assert scores(of_object(model, **cell)) == pytest.approx(scores(of_object(llama, **cell)), abs=1e-5)
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    eight = {"weights": "rtn", "bits": 8, "group_size": 16}
    assert scores(of_object(model, **eight)) == pytest.approx(scores(of_object(model)), abs=0.3)
    assert scores(of_object(llama, **eight)) != pytest.approx(scores(of_object(model)), abs=0.3)


def test_a_model_in_training_mode_is_evaluated_without_dropout(tmp_path):
    model = build_model("gpt2").train()
    assert model.transformer.drop.p > 0
    for arguments in ({"pretrained": model}, {"pretrained": build_model("gpt2").eval(), "reference": model}):
        lm = IntactKVLM(**arguments, tokenizer=byte_tokenizer(), batch_size=2)
        assert scores(lm) == pytest.approx(scores(of_object(build_model("gpt2"))), abs=1e-6)
        model.train()


# ---- what is in front of the model ----


def test_compiled_models_are_the_models_in_them(llama, saved_llama):
    whole = torch.compile(copy.deepcopy(llama), backend="eager")
    parts = copy.deepcopy(llama)
    for index, layer in enumerate(parts.model.layers):
        parts.model.layers[index] = torch.compile(layer, backend="eager")
    function = copy.deepcopy(llama)
    function.forward = torch.compile(function.forward, backend="eager")
    in_place = copy.deepcopy(llama)
    in_place.compile(backend="eager")
    for cell in ({"pivot": "none"}, {"reference": str(saved_llama)}, RTN, {**RTN, "rotate": True}):
        right = scores(of_object(llama, **cell))
        for model in (whole, parts, function, in_place, nn.DataParallel(llama)):
            assert scores(of_object(model, **cell)) == pytest.approx(right, abs=1e-5)
    assert answers(of_object(whole)) == answers(of_object(llama))
    assert of_object(whole).cell_record()["handed_over"]["in-memory"]["wrapped_by"] == ["torch.compile"]
    assert type(parts.model.layers[0]).__name__ == "OptimizedModule", "the user's model is left as it was"


def test_a_forward_that_was_put_into_the_object_is_kept_or_refused(llama):
    def forward(*args, inner=llama.forward, **kwargs):
        return inner(*args, **kwargs)

    llama.forward = forward
    assert scores(of_object(llama)) == pytest.approx(scores(of_object(build_model("llama"))), abs=1e-6)
    with pytest.raises(UnsupportedModelError, match="forward of LlamaForCausalLM is a function that was put into"):
        of_object(llama, **RTN)


def without_layers(model):
    model.model.layers = model.model.layers[:2]
    return model


def on_meta(model):
    model.model.layers[1].to("meta")
    return model


class Holder(nn.Module):
    """A wrapper that nobody knows, as TRL's value heads are."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model = model


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda model: AutoModel.from_config(model.config), UnsupportedModelError, "LlamaModel gives no logits"),
        (
            lambda model: AutoModelForSequenceClassification.from_config(model.config),
            UnsupportedModelError,
            "LlamaForSequenceClassification gives no logits",
        ),
        (on_meta, CheckpointError, r"model\.layers\.1\.self_attn\.q_proj\.weight, \.\.\.\) are on the device meta"),
        (without_layers, UnsupportedModelError, "no list of 3 decoder layers"),
        (Holder, ConfigError, r"class Holder was given.*Its \.pretrained_model may be"),
        (lambda model: byte_tokenizer(), ConfigError, "pretrained: an object of the class"),
    ],
    ids=["no head", "classifier", "meta", "too few layers", "unknown wrapper", "tokenizer"],
)
def test_objects_that_cannot_be_evaluated_are_called_what_they_are(llama, change, error, said):
    with pytest.raises(error, match=said):
        of_object(change(llama))


# ---- the arguments beside it ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": "bfloat16"}, r"dtype=bfloat16: the model was handed over in float32"),
        ({"revision": "v1"}, "revision=v1: does nothing"),
        ({"attn_implementation": "eager"}, "attn_implementation=eager: does nothing"),
        ({"parallelize": True}, "parallelize=True: does nothing"),
        ({"max_memory_per_gpu": 8}, "max_memory_per_gpu=8: does nothing"),
        ({"peft": "adapter"}, "peft=adapter: does nothing.*hand over the PeftModel"),
        ({"delta": "delta"}, "delta=delta: does nothing"),
        ({"subfolder": "inner"}, "subfolder=inner: does nothing"),
        ({"gguf_file": "a.gguf"}, "gguf_file=a.gguf: does nothing"),
        ({"backend": "cpu"}, "backend=cpu: does nothing"),
        ({"tokenizer": 3}, "tokenizer: an object of the class int"),
        ({"tokenizer": "/no/such/folder"}, "tokenizer='/no/such/folder' cannot be loaded"),
        ({"tokenizer": None}, "tokenizer: the model that was handed over does not say where its own is"),
    ],
    ids=str,
)
def test_an_argument_that_does_nothing_to_an_object_is_refused(llama, arguments, said):
    with pytest.raises(IntactKVError, match=said):
        of_object(llama, **arguments)


def test_the_same_arguments_that_say_what_the_object_is_are_taken(llama, saved_llama):
    right = scores(of_object(llama))
    for arguments in (
        {"dtype": "float32", "device": "cpu", "trust_remote_code": True, "parallelize": False, "revision": "main"},
        {"tokenizer": str(saved_llama)},
        {"tokenizer": saved_llama},
    ):
        assert scores(of_object(llama, **arguments)) == pytest.approx(right, abs=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(saved_llama)
    assert scores(IntactKVLM(loaded, batch_size=2)) == pytest.approx(right, abs=1e-5)
    assert scores(IntactKVLM(saved_llama, batch_size=2, device="cpu")) == pytest.approx(right, abs=1e-5)


def test_frequencies_that_were_rounded_with_the_model_are_told(llama, caplog):
    lm = of_object(llama.to(torch.bfloat16))
    assert "rotary_emb.inv_freq of the model that was handed over is in torch.bfloat16" in caplog.text
    assert lm.cell_record()["handed_over"]["in-memory"]["rounded_buffers"][0] == "model.rotary_emb.inv_freq"
