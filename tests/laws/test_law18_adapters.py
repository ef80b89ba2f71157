"""Law 18, adapters: an adapted model is evaluated as the model that it is, as an object and by `peft=`."""

import copy

import pytest
import torch
from helpers.object_models import RTN, SEVERAL, answers, of_folder, of_object, rounded, save, scores, values
from helpers.tiny import BOS, FAMILIES, build_model, byte_tokenizer
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import CheckpointError, ConfigError, UnsupportedModelError

# ---- adapters ----


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def adapted(peft, model, seed=3, config=None):
    """`model` with an adapter that is not zero; in place."""
    torch.manual_seed(seed)
    config = config or peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return wrapped.eval()


@pytest.fixture
def adapter(peft, tmp_path):
    adapted(peft, build_model("llama")).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


class BOSFirst(HFLM):
    """`hf` with BOS in front of every text, which its byte-level tokenizer does not add."""

    def tok_encode(self, string, *args, **kwargs):
        ids = super().tok_encode(string, add_special_tokens=False)
        return ids if ids[:1] == [BOS] else [BOS, *ids]


def test_adapters_are_evaluated_as_hf_does(peft, adapter, saved_llama):
    right = scores(BOSFirst(str(saved_llama), peft=adapter, device="cpu", dtype="float32"))
    assert right != pytest.approx(scores(of_folder(saved_llama)), abs=1e-2)
    model = adapted(peft, build_model("llama"))
    merged = adapted(peft, build_model("llama")).merge_and_unload()
    native = build_model("llama")
    native.load_adapter(adapter)
    for pivot in ({"pivot": "none"}, {"pivot": "bos"}, SEVERAL):
        lms = [of_folder(saved_llama, peft=adapter, **pivot), *(of_object(m, **pivot) for m in (model, native))]
        if pivot != SEVERAL:
            assert [scores(lm) for lm in lms] == [pytest.approx(right, abs=1e-4)] * 3
        assert answers(lms[0]) == answers(lms[1]) == answers(of_object(merged, **pivot))
    assert lms[1].cell_record()["handed_over"]["in-memory"]["adapters"] == ["LORA"]


def test_adapters_are_merged_before_their_layers_are_quantized(peft, adapter, saved_llama):
    merged = adapted(peft, build_model("llama")).merge_and_unload()
    for cell in (RTN, {**RTN, "rotate": True}, {"act_bits": 8}):
        right = scores(of_object(merged, **cell))
        assert scores(of_folder(saved_llama, peft=adapter, **cell)) == pytest.approx(right, abs=1e-4)
        model = adapted(peft, build_model("llama"))
        before = copy.deepcopy(model.state_dict())
        lm = of_object(model, **cell)
        assert scores(lm) == pytest.approx(right, abs=1e-4)
        assert lm.cell_record()["handed_over"]["adapters_merged"] is True
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_adapter_belongs_to_the_reference_too(peft, adapter, saved_llama, tmp_path):
    """The full-precision version of a quantized model with an adapter is the full model with that adapter."""
    base = build_model("llama")
    quantized = rounded(base)
    folder = save(quantized, tmp_path / "quantized")
    right = values(adapted(peft, copy.deepcopy(base)))
    assert not torch.allclose(values(base), right, atol=1e-2)
    lms = [
        of_folder(folder, peft=adapter, reference=str(saved_llama)),
        of_object(adapted(peft, copy.deepcopy(quantized)), reference=str(saved_llama)),
        of_object(adapted(peft, copy.deepcopy(quantized)), reference=base),
        of_object(adapted(peft, copy.deepcopy(quantized)), reference=adapted(peft, copy.deepcopy(base))),
    ]
    for lm in lms:
        torch.testing.assert_close(lm.pivoted_model.pivot.values[1], right, rtol=1e-4, atol=1e-5)
        assert scores(lm) == pytest.approx(scores(lms[0]), abs=1e-4)
    plain = of_folder(saved_llama, reference=str(saved_llama)).pivoted_model.pivot
    torch.testing.assert_close(plain.values[1], values(base)), "nothing is kept under the name of the bare model"
    assert not any("lora" in name for name, _ in base.named_parameters()), "the user's reference is left as it was"


@pytest.mark.parametrize(
    "where", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str
)
def test_embeddings_with_adapters_are_not_tied_again(peft, where):
    config = FAMILIES["llama"]()
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = AutoModelForCausalLM.from_config(config).eval()
    lora = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **where})
    model = adapted(peft, tied, config=lora)
    ids = torch.tensor([[BOS, *byte_tokenizer()("abc").input_ids]])
    with torch.no_grad():
        right = model(ids).logits.log_softmax(-1)[0, -2, ids[0, -1]]
    request = make_request("loglikelihood", ("ab", "c"), task="task")
    for pivot in ("none", "bos"):
        ((found, _),) = of_object(model, pivot=pivot).loglikelihood([request], disable_tqdm=True)
        assert found == pytest.approx(float(right), abs=1e-4)


def test_adapters_that_cannot_be_right_are_refused(peft, adapter, saved_llama, tmp_path):
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match=r"PROMPT_TUNING.*in front of every text"):
        of_object(peft.get_peft_model(build_model("llama"), prompt))
    named = adapted(peft, AutoModelForCausalLM.from_pretrained(saved_llama))
    named.save_pretrained(tmp_path / "named")
    with pytest.raises(ConfigError, match=f"pretrained={saved_llama}, and the adapter with peft={tmp_path}/named"):
        of_folder(tmp_path / "named")
    with pytest.raises(ConfigError, match="delta and peft"):
        of_folder(saved_llama, peft=adapter, delta=str(saved_llama))
    with pytest.raises(ConfigError, match="reference: the model that was handed over is without peft="):
        of_folder(saved_llama, peft=adapter, reference=build_model("llama"))
    packed = tmp_path / "packed"
    CliRunner().invoke(app, ["quantize", str(saved_llama), "--out", str(packed), "--group-size", "32"])
    with pytest.raises(ConfigError, match="is a packed checkpoint, into whose layers nothing can be added"):
        of_folder(packed, peft=adapter, pivot="none")


def test_an_adapter_in_part_is_refused(peft, adapter, saved_llama):
    """peft leaves what is missing at random numbers."""
    from safetensors.torch import load_file, save_file

    file = f"{adapter}/adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"the adapter lacks tensors.*lora_A"):
        of_folder(saved_llama, peft=adapter)


def test_peft_that_is_not_installed_is_named(saved_llama, monkeypatch):
    monkeypatch.setattr("intactkv_eval.compat.peft_api.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="peft=adapter: needs the package peft"):
        of_folder(saved_llama, peft="adapter")
