"""Weights in tensor subclasses that wrap other tensors, as torchao's: hashed, sampled, and evaluated."""

import copy

import pytest
import torch
from helpers.tiny import BOS, EOS, PAD, build_model
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from intactkv_eval.compat.lm_eval_api import HFLM, make_request
from intactkv_eval.compat.tensor_parts import plain_numbers, tensor_parts, weight_hash
from intactkv_eval.errors import PivotError, UnsupportedModelError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.hooks import where_not_finite
from intactkv_eval.model.linear import quantized_digest
from intactkv_eval.pivot.capture import embedding_hash, embedding_sample
from intactkv_eval.pivot.weight_sample import weight_sample

aten = torch.ops.aten
PAIRS = [("The sky is", " blue"), ("A", " far away")]


class Codes(torch.Tensor):
    """int8 codes with a scale a row, on which hardly anything may be done but a product."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, matrix):
        scale = matrix.abs().amax(1, keepdim=True) / 127
        return cls((matrix / scale).round().to(torch.int8), scale, matrix.dtype)

    def __tensor_flatten__(self):
        return ["codes", "scale"], {}

    @classmethod
    def __tensor_unflatten__(cls, parts, context, size, stride):
        return cls(parts["codes"], parts["scale"], parts["scale"].dtype)

    def dequantize(self):
        return self.codes.to(self.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (aten.detach.default, aten.alias.default, aten.clone.default):
            held = args[0]
            return return_and_correct_aliasing(func, args, kwargs or {}, cls(held.codes, held.scale, held.dtype))
        if func in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default, aten.embedding.default):
            plain = tree_map(lambda one: one.dequantize() if isinstance(one, cls) else one, (args, kwargs or {}))
            return func(*plain[0], **plain[1])
        raise NotImplementedError(f"{func} of {cls.__name__}")


class Opaque(Codes):
    dequantize = torch.Tensor.dequantize


def quantized(model, kind=Codes, words=False):
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear) or (words and isinstance(module, torch.nn.Embedding)):
            module.weight = torch.nn.Parameter(kind.of(module.weight.detach()), requires_grad=False)
    return model


def plainly(model):
    """The same numbers in plain tensors."""
    found = copy.deepcopy(model)
    for module in quantized(found).model.modules():
        if isinstance(getattr(module, "weight", None), Codes):
            module.weight = torch.nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return found


def scores(lm):
    asked = [make_request("loglikelihood", pair, place, task="t") for place, pair in enumerate(PAIRS)]
    return [value for value, _ in lm.loglikelihood(asked, disable_tqdm=True)]


def test_a_hash_is_of_the_parts_and_of_plain_tensors_as_ever(llama):
    plain = weight_hash(llama.named_parameters())
    assert weight_hash((name, one.data.clone()) for name, one in llama.named_parameters()) == plain
    held = quantized(build_model("llama"))
    first, again = weight_hash(held.named_parameters()), weight_hash(quantized(build_model("llama")).named_parameters())
    assert first == again != plain
    held.model.layers[0].mlp.up_proj.weight.scale[0] *= 2
    assert weight_hash(held.named_parameters()) != first
    names = [name for name, _ in tensor_parts("w", held.model.layers[0].mlp.up_proj.weight)]
    assert names == ["w.codes", "w.scale"]


def test_a_sample_is_of_the_numbers_that_are_stood_for():
    plain = plainly(build_model("llama"))
    held = quantized(build_model("llama"), words=True)
    plain.model.embed_tokens.weight.data = held.model.embed_tokens.weight.dequantize()
    expected, found = weight_sample(plain), weight_sample(held)
    assert found.keys() == expected.keys()
    for name, sampled in found.items():
        assert torch.allclose(sampled.numbers, expected[name].numbers, atol=1e-6), name
    assert not found["embeddings.weight"].plain
    assert not found["layers.0.mlp.up_proj.weight"].plain
    assert embedding_sample(held) == embedding_sample(plain)
    assert embedding_hash(held) != embedding_hash(plain)
    with pytest.raises(UnsupportedModelError, match="Opaque has no dequantize"):
        plain_numbers(Opaque.of(torch.randn(4, 4)))


def test_the_digest_tells_models_that_others_have_quantized():
    one, other = quantized(build_model("llama")), quantized(build_model("llama", seed=1))
    assert quantized_digest(one) == quantized_digest(quantized(build_model("llama")))
    assert len({quantized_digest(one), quantized_digest(other), quantized_digest(build_model("llama"))}) == 3


def test_broken_numbers_are_found_in_the_parts():
    held = quantized(build_model("llama"))
    held.model.layers[1].mlp.down_proj.weight.scale[3] = torch.nan
    said = where_not_finite(held, lambda: held(torch.tensor([[BOS, 5]])))
    assert "model.layers.1.mlp.down_proj.weight, a tensor" in said


def test_an_evaluated_model_of_wrappers_has_the_numbers_of_hf(tokenizer):
    plain = plainly(build_model("llama"))
    expected = scores(IntactKVLM(pretrained=plain, tokenizer=tokenizer, pivot="none", batch_size=1))
    intact = {"pivot": "bos", "reference": plain}
    for cell in ({"pivot": "none"}, intact, {"pivot": "none", "kv_bits": 8}):
        lm = IntactKVLM(pretrained=quantized(build_model("llama")), tokenizer=tokenizer, batch_size=2, **cell)
        assert scores(lm) == pytest.approx(expected, abs=0.1 if "kv_bits" in cell else 1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_torchaos_checkpoints(kind, tmp_path, tokenizer):
    """pivot=none is hf; pivot=bos is the quantized model behind the full-precision BOS; another model is refused."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    names = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "initializer_range": 0.15}
    for name, seed in (("base", 0), ("other", 1)):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=259, **shape, **names)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    asked = TorchAoConfig(getattr(torchao, kind)())
    base = str(tmp_path / "base")
    made = AutoModelForCausalLM.from_pretrained(base, quantization_config=asked, dtype=torch.float32)
    made.save_pretrained(tmp_path / "ao")
    tokenizer.save_pretrained(tmp_path / "ao")
    folder = {"pretrained": str(tmp_path / "ao"), "dtype": "float32", "device": "cpu"}
    pairs = [("<s>" + context, end) for context, end in PAIRS]
    hf = HFLM(**folder, batch_size=1)
    requests = [make_request("loglikelihood", pair, place, task="t") for place, pair in enumerate(pairs)]
    expected = [value for value, _ in hf.loglikelihood(requests, disable_tqdm=True)]
    assert scores(IntactKVLM(**folder, pivot="none", batch_size=2)) == pytest.approx(expected, abs=1e-4)
    full = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    behind = []
    for context, end in PAIRS:
        cache = DynamicCache()
        with torch.no_grad():
            full(torch.tensor([[BOS]]), past_key_values=cache)
            ids = torch.tensor([tokenizer(context + end, add_special_tokens=False).input_ids])
            chances = hf.model(ids, past_key_values=cache).logits.log_softmax(-1)
        last = len(tokenizer(end, add_special_tokens=False).input_ids)
        behind.append(float(chances[0, -last - 1 : -1].gather(1, ids[0, -last:, None]).sum()))
    found = scores(IntactKVLM(**folder, pivot="bos", reference=base, batch_size=2))
    assert found == pytest.approx(behind, abs=1e-4)
    assert found != pytest.approx(expected, abs=1e-4)
    with pytest.raises(PivotError, match=r"is not made from|does not belong to this model"):
        IntactKVLM(**folder, pivot="bos", reference=str(tmp_path / "other"))
