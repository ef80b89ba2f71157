"""Whole checkpoint folders of a tiny Llama, written by GPTQModel 7.7.0, and what GPTQModel reads from them.

Made with Python 3.11 and
    pip install torch==2.14.1 gptqmodel==7.7.0 transformers==5.23.0 tokenizers==0.23.3 safetensors==0.8.0
    OMP_NUM_THREADS=1 GPTQMODEL_CPU_WORKERS=2 HF_HUB_OFFLINE=1 python make_gptqmodel.py fixtures/gptqmodel [name ...]

Each folder is what GPTQModel's save() left, less quant_log.csv, plus dequantized.safetensors: <module name>: fp16 [out, in],
the weights of every quantized module as GPTQModel itself has them:
  gptq*         The folder is loaded again with its torch kernel on the CPU; the transpose of each module's
                dequantize_weight(), which gathers scales and zero points by g_idx, the zero points of v1 having been
                made those of v2 while loading.
  awq-gemm*     Likewise, by the function that its torch kernel for AWQ calls, dequantize_gemm.
  awq-<other>   GPTQModel reads gemv, gemv_fast and llm-awq by CUDA kernels only (and it asks for a GPU to write them too:
                its own packing code runs here with that one check lifted). Their codes are those of awq-gemm-g64: the
                settings are the same but for the format, and it is asserted here, by packing these codes with
                GPTQModel's own functions. gemv is (code - zero) * scale as gemm is. gemv_fast and llm-awq are
                fma(code, scale, zeros) in fp16, with one rounding, as their kernels do (gptqmodel_ext/awq/quantization_new),
                where the tensor of zeros holds -(scale * zero) already rounded to fp16: not always equal to gemm's.
"""

import shutil
import sys
from pathlib import Path

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.models._const import DEVICE
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.gemv_awq import AwqGEMVLinear
from gptqmodel.nn_modules.qlinear.gemv_fast_awq import AwqGEMVFastLinear, LLMAwqLinear, pack_intweight
from gptqmodel.quantization.awq.utils.packing_utils import (
    dequantize_gemm,
    pack_awq_columns,
    reverse_awq_order,
    unpack_awq,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

GPTQ = {"method": "gptq", "group_size": 32, "offload_to_disk": False}
AWQ = {"method": "awq", "bits": 4, "group_size": 64, "sym": False, "offload_to_disk": False}
DYNAMIC = {  # the first pattern that matches a module's name decides
    r"-:.*layers\.0\.self_attn\.k_proj": {},  # left as it was
    r"+:.*layers\.1\.mlp\.down_proj": {"bits": 8, "group_size": 64, "sym": False},
    r".*gate_proj": {"bits": 3, "desc_act": True},
}
FOLDERS = {
    "gptq-w4-act-asym": {**GPTQ, "bits": 4, "desc_act": True, "sym": False, "format": "gptq"},
    "gptq2-w4-act-asym": {**GPTQ, "bits": 4, "desc_act": True, "sym": False, "format": "gptq_v2"},
    "gptq-w3-sym": {**GPTQ, "bits": 3, "desc_act": False, "sym": True},
    "gptq-w3-act-asym": {**GPTQ, "bits": 3, "desc_act": True, "sym": False},
    "gptq-w2-asym": {**GPTQ, "bits": 2, "desc_act": False, "sym": False},
    "gptq-w8-sym": {**GPTQ, "bits": 8, "desc_act": False, "sym": True},
    "gptq-w8-act-asym": {**GPTQ, "bits": 8, "desc_act": True, "sym": False},
    "gptq-w4-group-1": {**GPTQ, "act_group_aware": False, "bits": 4, "desc_act": False, "sym": False, "group_size": -1},
    "gptq-w4-lm-head": {**GPTQ, "bits": 4, "desc_act": False, "sym": True, "lm_head": True},
    "gptq-dynamic": {**GPTQ, "bits": 4, "desc_act": False, "sym": True, "dynamic": DYNAMIC},
    "gptqp-w5": {**GPTQ, "bits": 5, "desc_act": False, "sym": False},  # it makes the format gptq_p of itself
    "gptqp-w3": {**GPTQ, "bits": 3, "desc_act": False, "sym": True, "format": "gptq_p"},
    "awq-gemm-g32": {**AWQ, "format": "gemm", "group_size": 32},
    "awq-gemm-g64": {**AWQ, "format": "gemm"},
    "awq-gemv": {**AWQ, "format": "gemv"},
    "awq-gemv-fast": {**AWQ, "format": "gemv_fast"},
    "awq-llm": {**AWQ, "format": "llm-awq"},
    "awq-gemm-w3": {**AWQ, "format": "gemm", "bits": 3},
}
for kind in (AwqGEMVLinear, AwqGEMVFastLinear, LLMAwqLinear):
    kind.SUPPORTS_DEVICES = [DEVICE.ALL]


def tokenizer():
    """256 bytes, <s>, </s>, <pad>, as in tests/conftest.py."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


def tiny_llama(folder):
    config = LlamaConfig(
        vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=128, bos_token_id=256, eos_token_id=257,
        pad_token_id=258, tie_word_embeddings=False, initializer_range=0.15,
    )  # fmt: skip  # head_dim 32: GPTQModel's AWQ asks for multiples of 64 rows
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):  # rows whose zero points lie at the ends: 0, and the maximum
                module.weight[0::5] = module.weight[0::5].abs()
                module.weight[1::7] = -module.weight[1::7].abs()
    model.half().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return config.vocab_size


def samples(vocabulary):
    """Nothing to be learned from them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (16, 1, 64), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def quantize(source, folder, calibration, settings):
    """Let GPTQModel quantize the model of folder `source` into folder `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu", dtype=torch.float16)
    model.quantize(calibration, batch_size=1)
    model.save(str(folder))
    (Path(folder) / "quant_log.csv").unlink(missing_ok=True)


def read(folder, method):
    """{module name: fp16 weight [out, in]} as GPTQModel reads the folder."""
    backend = {"gptq": BACKEND.GPTQ_TORCH, "awq": BACKEND.AWQ_TORCH}[method]
    model = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=torch.float16).model
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            with torch.no_grad():
                if method == "awq":
                    weight = dequantize_gemm(
                        module.qweight, module.qzeros, module.scales, module.bits, module.group_size
                    )
                else:
                    weight = type(module).dequantize_weight(module)  # the class's own: the module's is compiled
            assert weight.dtype == torch.float16
            assert weight.shape == (module.in_features, module.out_features)
            weights[name] = weight.T.contiguous()
    assert weights
    return weights


def derive(folder, gemm, size):
    """{module name: fp16 weight [out, in]} of a gemv, gemv_fast or llm-awq folder, from the gemm folder of the same codes."""
    packed, like = (load_file(Path(where) / "model.safetensors") for where in (folder, gemm))
    weights = load_file(Path(gemm) / "dequantized.safetensors")
    for name, weight in weights.items():
        codes, zeros = unpack_awq(like[f"{name}.qweight"], like[f"{name}.qzeros"], 4)
        codes, zeros = (tensor.T.int().contiguous() for tensor in reverse_awq_order(codes, zeros, 4))
        scales, groups = like[f"{name}.scales"].T, weight.shape[1] // size
        if packed[f"{name}.qweight"].dtype == torch.int32:
            assert torch.equal(packed[f"{name}.qweight"], pack_awq_columns(codes, 4))
            assert torch.equal(packed[f"{name}.scales"][:, :groups], scales)
        else:
            assert torch.equal(packed[f"{name}.qweight"], pack_intweight(codes, 4, 64))
            assert torch.equal(packed[f"{name}.scales"][:groups].T, scales)
            offsets = packed.get(f"{name}.scaled_zeros", packed.get(f"{name}.qzeros"))[:groups].T
            scales, offsets = (each.double().repeat_interleave(size, 1) for each in (scales, offsets))
            weights[name] = (codes * scales + offsets).half()
            assert (weights[name] - weight).abs().max() < 1e-2
    return weights


def main(target, names):
    target = Path(target)
    calibration = samples(tiny_llama(target / "source"))
    for name in names or FOLDERS:
        settings = FOLDERS[name]
        quantize(target / "source", target / name, calibration, settings)
        if name in ("awq-gemv", "awq-gemv-fast", "awq-llm"):
            weights = derive(target / name, target / "awq-gemm-g64", settings["group_size"])
        else:
            weights = read(target / name, settings["method"])
        save_file(weights, target / name / "dequantized.safetensors")
    shutil.rmtree(target / "source")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
