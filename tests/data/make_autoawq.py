"""Linear layers packed by AutoAWQ 0.2.9's own code, in each of its layouts: bytes and dequantized weights.

Made with Python 3.11 and
    pip install torch==2.6.0 transformers==4.51.3 numpy==2.2.6 safetensors==0.8.0 accelerate==1.15.0 datasets==5.0.1 \
        zstandard==0.25.0 torchvision==0.21.0 pillow==13.0.0 && pip install --no-deps autoawq==0.2.9
    OMP_NUM_THREADS=1 python make_autoawq.py fixtures/autoawq.safetensors

Per case: <case>.qweight, .scales, .qzeros (not Marlin), .bias (some), and <case>.dequantized, fp16 [out, in], without the
bias. `cases` in the metadata is JSON: {case: {version, bits, group_size, in_features, out_features, bias, zero_point,
quantization_config}}, the last as AutoAWQ writes it into config.json.

Packed by <WQLinear>.from_linear. Where the dequantized weights come from:
  gemm       awq.utils.packing_utils.dequantize_gemm; asserted equal to the layer's forward(identity) on the CPU, and to
             the weights given to from_linear. These lie on the grid, so that the bytes hold them without loss.
  gemv       AutoAWQ reads it by a CUDA kernel only. The weights given to from_linear, on the grid, so that they are what
             the bytes hold, as asserted for gemm: (code - zero) * scale, rounded to fp16.
  gemv_fast  AutoAWQ reads it by a CUDA kernel only, as fma(code, scale, qzeros) in fp16, where qzeros holds
             -(scale * zero) already rounded to fp16. Computed so here, with one rounding, from the codes given to
             from_linear and the tensors `scales` and `qzeros` of the layer: not always equal to (code - zero) * scale.
  marlin     AutoAWQ reads it by a CUDA kernel only. As for gemv, with zero 8, and no tensor for it.

from_linear raises for group_size -1 in every layout (gemm: IndexError; gemv, gemv_fast: NotImplementedError; marlin:
RuntimeError), though the constructors of gemm, gemv_fast and gemv take it to mean in_features; so *-whole passes in_features.
"""

import json
import sys

import torch
from awq.models._config import AwqConfig
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV, WQLinear_GEMVFast, WQLinear_Marlin, gemm
from awq.utils.packing_utils import dequantize_gemm
from safetensors.torch import save_file

gemm.TRITON_AVAILABLE = False  # it was importable, but it has no CPU to run on: take the naive path of forward
KINDS = {"gemm": WQLinear_GEMM, "gemv": WQLinear_GEMV, "gemv_fast": WQLinear_GEMVFast, "marlin": WQLinear_Marlin}
tensors, cases = {}, {}


def add(case, version, group_size, width, height=32, bias=False):
    generator = torch.Generator().manual_seed(len(cases))
    groups = width // group_size
    symmetric = version == "marlin"
    scales = (torch.rand(height, groups, generator=generator) * 0.04 + 0.01).half()
    zeros = torch.randint(0, 16, (height, groups), generator=generator).float()
    zeros[0, 0], zeros[height - 1, -1] = 0, 15  # both ends are there
    if symmetric:
        zeros[:] = 8
    codes = torch.randint(0, 16, (height, width), generator=generator).float()
    expected = (codes - zeros.repeat_interleave(group_size, 1)) * scales.float().repeat_interleave(group_size, 1)
    linear = torch.nn.Linear(width, height, bias=bias)
    linear.weight.data = expected.clone()
    if bias:
        linear.bias.data = torch.randn(height, generator=generator)
    linear.half()
    expected = expected.half()

    given = {"scales": scales, "zeros": None if symmetric else zeros}
    if version == "gemm":  # as AutoAWQ's quantizer does
        given = {name: tensor.T.contiguous() for name, tensor in given.items()}
    layer = KINDS[version].from_linear(linear, 4, group_size, **given)
    packed = {name: t.clone().contiguous() for name, t in layer.state_dict().items()}
    if version == "gemm":
        found = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, group_size).T.contiguous()
        assert torch.equal(found, expected), case
        layer.bias = None
        assert torch.equal(layer(torch.eye(width).half()).T, expected), case
    elif version == "gemv_fast":
        each = [packed[name][:groups].T.repeat_interleave(group_size, 1).double() for name in ("scales", "qzeros")]
        found = (codes.double() * each[0] + each[1]).half()
        assert (found - expected).abs().max() < 1e-3, case
    else:
        found = expected

    config = AwqConfig(zero_point=not symmetric, q_group_size=group_size, w_bit=4, version=version)
    cases[case] = {
        "version": version, "bits": 4, "group_size": group_size, "in_features": width, "out_features": height,
        "bias": bias, "zero_point": not symmetric, "quantization_config": config.to_transformers_dict(),
    }  # fmt: skip
    tensors.update({f"{case}.{name}": t for name, t in packed.items()})
    tensors[f"{case}.dequantized"] = found


for version in ("gemm", "gemv", "gemv_fast"):
    add(f"{version}-g32", version, 32, 64)
    add(f"{version}-g64", version, 64, 128)
    add(f"{version}-g128", version, 128, 256, 32 if version == "gemm" else 8)
    add(f"{version}-whole", version, 192, 192, 32 if version == "gemm" else 8)
add("gemm-wide-bias", "gemm", 32, 96, 64, bias=True)
add("gemv-long-bias", "gemv", 32, 320, 8, bias=True)  # ten groups: more than one word of zeros per row
add("gemv_fast-long-bias", "gemv_fast", 32, 320, 8, bias=True)
add("marlin-g64", "marlin", 64, 128, 64)
add("marlin-whole", "marlin", 128, 128, 64)

save_file(tensors, sys.argv[1], metadata={"library": "autoawq 0.2.9", "cases": json.dumps(cases)})
