"""Law 16, weights: every quantizer that is named after a paper gives the numbers of that paper's released code.

The fixtures were made by that code itself (tests/fixtures/released/make_weights.py says which, and how). Scales are taken in
fp32 here, as the released code has them; docs/released-formulas.md says where ours are rounded to 16 bits first.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from intactkv_eval.quantize.gptq import GPTQ, gptq
from intactkv_eval.quantize.rtn import fake_quantize, group_range, quantize_in_range
from intactkv_eval.quantize.shrink import shrunk_range

DATA = Path(__file__).parents[1] / "fixtures" / "released"
FORMULAS = {"quarot": "quarot", "omniquant": "omniquant", "awq": "awq", "autogptq": "gptq"}


def fixture(name):
    with safe_open(DATA / name, framework="pt") as file:
        return json.loads(file.metadata()["cases"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


RTN_CASES, RTN = fixture("weights_rtn.safetensors")
GPTQ_CASES, OF_GPTQ = fixture("weights_gptq.safetensors")


def formula(case):
    return FORMULAS[case["by"]] if case["symmetric"] else None


def in_released_range(weight, case):
    """`weight` quantized as the case says, by our code, with fp32 scales."""
    size = case["group"]
    low, high = group_range(weight, size)
    if case["shares"]:
        low, high = (end * RTN[side][: low.numel()].sigmoid().view(low.shape)
                     for end, side in ((low, "low"), (high, "high")))  # fmt: skip
    if case["clip"]:
        low, high = shrunk_range(weight, case["bits"], size, formula(case), torch.float32)
    return quantize_in_range(weight, (low, high), case["bits"], size, torch.float32, formula(case))


@pytest.mark.parametrize("name", RTN_CASES)
def test_ranges_scales_and_rounding(name):
    """QuaRot's with and without its search of clips, OmniQuant's with and without learned ones, AWQ's: bit for bit."""
    case = RTN_CASES[name]
    rows = slice(case["rows"])
    found = in_released_range(RTN["weight"], case)
    assert torch.equal(found.scales[rows], RTN[f"{name}.scale"][rows])
    assert torch.equal(found.dequantize()[rows], RTN[f"{name}.out"][rows])
    if not case["symmetric"]:
        assert torch.equal(found.zeros[rows].float(), RTN[f"{name}.zero"][rows])


@pytest.mark.parametrize("name", [name for name, case in RTN_CASES.items() if case["shares"]])
def test_gradients_of_learned_clips(name):
    """OmniQuant's: by the strengths of both ends, through its rounding."""
    case, rows = RTN_CASES[name], RTN_CASES[name]["rows"]
    weight = RTN["weight"][:rows]
    low, high = group_range(weight, case["group"])
    strengths = [RTN[side][: low.numel()].clone().requires_grad_() for side in ("low", "high")]
    shares = [strength.sigmoid().view(low.shape) for strength in strengths]
    out = fake_quantize(
        weight, low * shares[0], high * shares[1], case["bits"], case["group"], torch.float32, formula(case)
    )
    found = torch.autograd.grad((out * weight).sum(), strengths, allow_unused=False)
    for slope, side in zip(found, ("low", "high"), strict=True):
        torch.testing.assert_close(slope, RTN[f"{name}.{side}_slope"][: low.numel()], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", GPTQ_CASES)
def test_gptq(name):
    """AutoGPTQ's and QuaRot's, in groups smaller than a block of 128 and as wide, by act-order, with static groups."""
    case = GPTQ_CASES[name]
    rows = OF_GPTQ["inputs"].float().view(-1, OF_GPTQ["inputs"].shape[-1]) / 256
    options = GPTQ(case["bits"], case["group"], formula(case), case["act_order"], case["static_groups"], 0.01,
                   shrink=case["clip"])  # fmt: skip
    found = gptq(OF_GPTQ["weight"], rows.T @ rows, options, scale_dtype=torch.float32)
    codes, index = OF_GPTQ[f"{name}.codes"], OF_GPTQ[f"{name}.index"].long()
    scale, zero = (OF_GPTQ[f"{name}.{key}"][:, index].float() for key in ("scale", "zero"))
    order = torch.arange(len(index)) if found.order is None else torch.argsort(found.order)
    assert torch.equal(found.unpacked()[:, order], codes)
    assert torch.equal(found.zeros, OF_GPTQ[f"{name}.zero"])
    torch.testing.assert_close(found.dequantize(), (codes - zero) * scale, rtol=0, atol=1e-6)
    if case["static_groups"] or case["group"] == -1:
        assert torch.equal(found.scales, OF_GPTQ[f"{name}.scale"])
