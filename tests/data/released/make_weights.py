"""Numbers of released quantizers of weights: what their own code makes of small matrices, for law 16.

    git clone https://github.com/spcl/QuaRot            5008669b08c1f11f9b64d52d16fddd47ca754c5a
    git clone https://github.com/OpenGVLab/OmniQuant    95fae1bd00eaa60d03a20eb39c76c4cb173f51f7
    git clone https://github.com/AutoGPTQ/AutoGPTQ      9f7d37072917ab3a7545835f23e808294a542153
    git clone https://github.com/ruikangliu/IntactKV    e9b841e9357c59ed800620373454110fc52fbfe4  (its llm_awq)
    git clone https://github.com/casper-hansen/AutoAWQ  88e4c76b20755db275574e6a03c83c84ba3bece5
    pip install torch transformers safetensors tqdm numpy
    OMP_NUM_THREADS=1 python make_weights.py QuaRot OmniQuant AutoGPTQ IntactKV AutoAWQ

The arguments are the folders of the clones. Nothing of them is copied: their files are imported where they lie.
Stubbed, since the machine has no CUDA and nothing of it takes part in these numbers: QuaRot's modules `utils`,
`hadamard_utils` and `fast_hadamard_transform`; the packages around the files of AutoGPTQ, llm-awq and AutoAWQ, whose
`__init__` import kernels, and what those files import but do not use here; and torch.cuda.synchronize.

AWQ's asymmetric numbers are llm-awq's, its symmetric ones AutoAWQ's: llm-awq writes the same formula, behind an
assertion that cannot be evaluated.

weights_rtn.safetensors   `weight` [5, 64], whose last row lies below the floor of the symmetric formulas, and
    <case>.out     the dequantized matrix as the released quantizer gives it
    <case>.scale   its scales [5, G], fp32;  <case>.zero  its zero points, where it has some
    <case>.low_slope, .high_slope  where clips are learned: the gradients of sum(out * weight) by `low` and `high`
    `cases`        in the metadata: {case: {by, bits, group, symmetric, clip, shares}}; only `rows` rows are meant
    `low`, `high`  the strengths that OmniQuant's clipping is given, [5 * G, 1], before its sigmoid

weights_gptq.safetensors  `weight` [6, 256], `inputs` [2, 80, 256] as int8, in steps of 1/256, and
    <case>.codes   uint8 [6, 256], columns as they lie;  <case>.scale, .zero  [6, G];  <case>.index  [256] of groups
    `cases`        in the metadata: {case: {by, bits, group, symmetric, act_order, static_groups, clip}}

The inputs are few binary digits and their two samples make the factor of GPTQ's matrix 1, so that it is exact in fp32
in whatever order it is summed. One input is always zero, with a large weight in one row, and counts as 1 in it: more
than most others. The dequantized matrix that the
released code gives was found to be (codes - zero) * scale, bit for bit, before it was left out here.
"""

import contextlib
import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from subprocess import check_output

import torch
from safetensors.torch import save_file
from torch import nn

COMMITS = {
    "QuaRot": "5008669b08c1f11f9b64d52d16fddd47ca754c5a",
    "OmniQuant": "95fae1bd00eaa60d03a20eb39c76c4cb173f51f7",
    "AutoGPTQ": "9f7d37072917ab3a7545835f23e808294a542153",
    "IntactKV": "e9b841e9357c59ed800620373454110fc52fbfe4",
    "AutoAWQ": "88e4c76b20755db275574e6a03c83c84ba3bece5",
}
UNUSED_OF_AUTOAWQ = {
    "awq.utils": "",
    "awq.modules": "",
    "awq.utils.calib_data": "get_calib_dataset",
    "awq.quantize.scale": "apply_scale apply_clip",
    "awq.utils.utils": "clear_memory get_best_device",
    "awq.modules.linear": "WQLinear_GEMM WQLinear_GEMV WQLinear_Marlin WQLinear_GEMVFast",
    "awq.utils.module": "append_str_prefix get_op_name get_named_linears set_op_by_name exclude_layers_to_not_quantize",
}
KEYS = ("out", "scale", "zero", "low_slope", "high_slope")
HERE = Path(__file__).parent
SEED, DAMP, UNUSED = 4, 0.01, 77  # of 3 to 8 the seed whose codes survive changes of a millionth in H


def stub(name, folder=None, **attributes):
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    if folder is not None:
        module.__path__ = [str(folder)]  # a package whose __init__ is not run
    sys.modules[name] = module


def released(folders):
    """The modules of the released code, by name."""
    for name, folder in folders.items():
        commit = check_output(["git", "-C", str(folder), "rev-parse", "HEAD"], text=True).strip()
        assert commit == COMMITS[name], f"{folder} is at {commit}, not at {COMMITS[name]}"
    stub("utils", cleanup_memory=lambda verbos=True: None)
    stub("hadamard_utils")
    stub("fast_hadamard_transform")
    sys.path.insert(0, str(folders["QuaRot"] / "fake_quant"))
    stub("auto_gptq", folders["AutoGPTQ"] / "auto_gptq")
    stub("auto_gptq.quantization", folders["AutoGPTQ"] / "auto_gptq" / "quantization")
    awq = folders["IntactKV"] / "llm_awq"
    stub("llm_awq", awq)
    stub("llm_awq.quantize", awq / "quantize")
    stub("llm_awq.quantize.qmodule", ScaledActivation=object)
    stub("llm_awq.utils", awq / "utils")
    stub("llm_awq.utils.module", set_op_by_name=None)
    stub("awq", folders["AutoAWQ"] / "awq")
    stub("awq.quantize", folders["AutoAWQ"] / "awq" / "quantize")
    for name, words in UNUSED_OF_AUTOAWQ.items():
        stub(name, **dict.fromkeys(words.split()))
    torch.cuda.synchronize = lambda: None
    spec = importlib.util.spec_from_file_location("omniquant", folders["OmniQuant"] / "quantize" / "quantizer.py")
    omniquant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(omniquant)
    return types.SimpleNamespace(
        quarot=importlib.import_module("quant_utils"),
        quarot_gptq=importlib.import_module("gptq_utils"),
        autogptq=importlib.import_module("auto_gptq.quantization.gptq"),
        awq=importlib.import_module("llm_awq.quantize.quantizer"),
        autoawq=importlib.import_module("awq.quantize.quantizer"),
        omniquant=omniquant,
    )


def by_quarot(code, weight, case):
    parts = weight.split(case["group"], dim=1)
    out, scales, zeros = [], [], []
    for part in parts:
        quantizer = code.quarot.WeightQuantizer()
        quantizer.configure(case["bits"], perchannel=True, sym=case["symmetric"], mse=case["clip"])
        quantizer.find_params(part)
        out.append(quantizer.quantize(part))
        scales.append(quantizer.scale)
        zeros.append(quantizer.zero)
    return torch.cat(out, dim=1), torch.cat(scales, dim=1), torch.cat(zeros, dim=1)


def by_omniquant(code, weight, case, strengths):
    symmetric = case["symmetric"]
    quantizer = code.omniquant.UniformAffineQuantizer(
        case["bits"], symmetric, dynamic_method="per_channel", group_size=case["group"], shape=weight.shape,
        lwc=case["shares"], disable_zero_point=symmetric,
    )  # fmt: skip
    if case["shares"]:
        count = weight.numel() // case["group"]
        quantizer.lowbound_factor.data = strengths["low"][:count]
        quantizer.upbound_factor.data = strengths["high"][:count]
    out = quantizer(weight)
    if case["shares"]:
        (out * weight)[: case["rows"]].sum().backward()
        slopes = [quantizer.lowbound_factor.grad, quantizer.upbound_factor.grad]
    else:
        slopes = [None, None]
    zeros, rows = quantizer.round_zero_point, len(weight)
    zeros = None if zeros is None else zeros.view(rows, -1)
    return [None if t is None else t.detach() for t in (out, quantizer.scale.view(rows, -1), zeros, *slopes)]


def by_awq(code, weight, case):
    if case["symmetric"]:
        settings = types.SimpleNamespace(w_bit=case["bits"], group_size=case["group"], zero_point=False)
        return code.autoawq.AwqQuantizer.pseudo_quantize_tensor(settings, weight.clone())
    return code.awq.pseudo_quantize_tensor(weight.clone(), case["bits"], True, case["group"], get_scale_zp=True)


def rtn(code):
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(5, 64, generator=generator) / 8
    weight[1, 5], weight[2, 40] = 2.5, -1.75
    weight[4] *= 1e-6
    strengths = {side: torch.randn(10, 1, generator=generator) + 1 for side in ("low", "high")}
    tensors, cases = {"weight": weight, **strengths}, {}
    for bits in (3, 4, 8):
        for group in (64, 32):
            for symmetric in (True, False):
                kinds = [("quarot", "clip", False), ("quarot", "clip", True), ("omniquant", "shares", False),
                         ("omniquant", "shares", True), ("awq", "clip", False)]  # fmt: skip
                for by, option, on in kinds:
                    case = {"by": by, "bits": bits, "group": group, "symmetric": symmetric, "clip": False,
                            "shares": False, option: on, "rows": 5 if symmetric and not on else 4}  # fmt: skip
                    if by == "omniquant":
                        found = by_omniquant(code, weight, case, strengths)
                    else:
                        found = (by_quarot if by == "quarot" else by_awq)(code, weight, case)
                    name = f"{by}-w{bits}g{group}-{'sym' if symmetric else 'asym'}{f'-{option}' if on else ''}"
                    cases[name] = case
                    tensors |= {f"{name}.{key}": t.contiguous() for key, t in zip(KEYS, found, strict=False)
                                if t is not None}  # fmt: skip
    return tensors, cases


def fasterquant(code, weight, inputs, case):
    """The matrix as the released GPTQ leaves it, scales and zeros [O, G], and the group of each column."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    kind = code.quarot_gptq.GPTQ if case["by"] == "quarot" else code.autogptq.GPTQ
    run = kind(layer)
    noted = {}
    if case["by"] == "quarot":
        run.quantizer = code.quarot.WeightQuantizer()
    run.quantizer.configure(case["bits"], perchannel=True, sym=case["symmetric"], mse=case["clip"])
    run.add_batch(inputs.float() / 256, None)
    options = {"percdamp": DAMP, "actorder": case["act_order"], "static_groups": case["static_groups"]}
    if case["by"] == "autogptq":
        scale, zero, index = run.fasterquant(group_size=case["group"], **options)
        return layer.weight.data, scale, zero, index
    # QuaRot's keeps no scales: those of each group are noted as it finds them
    found, find = [], run.quantizer.find_params
    run.quantizer.find_params = lambda x: (find(x), found.append((run.quantizer.scale, run.quantizer.zero)))[0]
    run.fasterquant(groupsize=case["group"], **options)
    found = found if case["group"] == -1 else found[1:]  # the first is that of whole rows, which groups replace
    noted["scale"], noted["zero"] = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    order = torch.argsort(torch.diag(matrix_of(inputs)), descending=True)
    place = torch.argsort(order) if case["act_order"] else torch.arange(len(order))
    size = weight.shape[1] if case["group"] == -1 else case["group"]
    return layer.weight.data, noted["scale"], noted["zero"], place // size


def matrix_of(inputs):
    rows = (inputs.float() / 256).view(-1, inputs.shape[-1])
    found = rows.T @ rows
    found[UNUSED, UNUSED] = 1
    return found


def gptq_cases():
    for group in (32, 64, 128, -1):
        for act_order in (False, True):
            for static in (False, True) if group != -1 else (False,):
                for symmetric in (True, False):
                    yield {"by": "autogptq", "bits": 3, "group": group, "symmetric": symmetric,
                           "act_order": act_order, "static_groups": static, "clip": False}  # fmt: skip
    for group in (64, -1):
        for act_order in (False, True):
            for symmetric in (True, False):
                for clip in (False, True):
                    yield {"by": "quarot", "bits": 4, "group": group, "symmetric": symmetric, "act_order": act_order,
                           "static_groups": False, "clip": clip}  # fmt: skip


def gptq(code):
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(6, 256, generator=generator) / 8
    mix = torch.randn(256, 256, generator=generator) / 20 + torch.eye(256)
    inputs = (
        torch.randn(2, 80, 256, generator=generator)
        @ mix
        * torch.linspace(2, 24, 256)[torch.randperm(256, generator=generator)]
    )
    inputs = inputs.round().clamp(-127, 127).to(torch.int8)
    inputs[:, :, UNUSED] = 0
    weight[3, UNUSED] = 3.0
    tensors, cases = {"weight": weight, "inputs": inputs}, {}
    for case in gptq_cases():
        out, scale, zero, index = fasterquant(code, weight, inputs, case)
        # QuaRot's symmetric codes are signed, and its zero is 0
        middle = 2 ** (case["bits"] - 1) if case["by"] == "quarot" and case["symmetric"] else 0
        each = [tensor[:, index.long()] for tensor in (scale, zero)]
        codes = (out / each[0]).round() + each[1]
        assert torch.equal((codes - each[1]) * each[0], out), case
        codes = codes + middle
        assert codes.min() >= 0 and codes.max() < 2 ** case["bits"], case  # noqa: PT018
        flags = [word for word in ("act_order", "static_groups", "clip") if case[word]]
        name = "-".join([case["by"], f"g{case['group']}", "sym" if case["symmetric"] else "asym", *flags])
        cases[name] = case
        tensors |= {f"{name}.codes": codes.to(torch.uint8), f"{name}.scale": scale.contiguous(),
                    f"{name}.zero": (zero + middle).to(torch.uint8), f"{name}.index": index.to(torch.uint8)}  # fmt: skip
    return tensors, cases


def main():
    folders = dict(zip(COMMITS, map(Path, sys.argv[1:]), strict=True))
    code = released(folders)
    for make in (rtn, gptq):
        with contextlib.redirect_stdout(sys.stderr):
            tensors, cases = make(code)
        save_file(tensors, HERE / f"weights_{make.__name__}.safetensors",
                  metadata={"commits": json.dumps(COMMITS), "cases": json.dumps(cases)})  # fmt: skip


if __name__ == "__main__":
    main()
