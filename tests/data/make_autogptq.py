"""Linear layers packed and read back by AutoGPTQ 0.7.1's own code: bytes and dequantized weights.

Made with Python 3.11 and
    pip install torch==2.2.1 numpy==1.26.4 safetensors==0.8.0 transformers==4.38.2 auto_gptq==0.7.1 accelerate==0.27.2 \
        peft==0.9.0 datasets==2.20.0 fsspec==2024.5.0 pyarrow==16.1.0 pandas==2.2.3 gekko rouge sentencepiece
    OMP_NUM_THREADS=1 python make_autogptq.py fixtures/autogptq.safetensors

Written by `<QuantLinear>.pack`, where <QuantLinear> is the class AutoGPTQ itself picks (on a machine without its compiled
kernels) by bits, desc_act and group size: qlinear_cuda_old if not desc_act or group_size == -1, else qlinear_cuda.

Per case: <case>.qweight, .qzeros, .scales, .g_idx, .bias (some), and
    <case>.dequantized      fp16 [out, in], forward(identity) of the class AutoGPTQ picks for this layer
    <case>.dequantized_cuda fp16 [out, in], forward(identity) of qlinear_cuda on the same bytes, only where it differs
The bias is left out of both. `cases` in the metadata is JSON: {case: {bits, group_size, desc_act, sym, in_features,
out_features, bias, packed_by, read_by, zeros}}; `zeros` are the zero points handed to pack(), [group][out], before it
subtracted one from each.

What AutoGPTQ does when a zero point is 0 (cases `*-zero0-*`): it is stored minus one. pack() casts float -1 to uint32
(0xffffffff on x86-64) and ORs it, shifted but not masked, into the word: all later zero points of the same 32-bit word
become the maximum as well. qlinear_cuda_old reads a stored maximum as 0 for 2, 4, 8 bits (adds one, then masks), but as
8 for 3 bits (no mask after adding); qlinear_cuda (act-order) masks, then adds one: 4, 8, 16 or 256.
"""

import json
import sys

import torch
from auto_gptq.nn_modules.qlinear import qlinear_cuda
from auto_gptq.utils.import_utils import dynamically_import_QuantLinear
from safetensors.torch import save_file

tensors, cases = {}, {}


def read(kind, case, packed):
    """The weight matrix [out, in] as `kind`'s torch code computes it."""
    bits, group_size, width, height = (cases[case][k] for k in ("bits", "group_size", "in_features", "out_features"))
    layer = kind(bits, group_size, width, height, bias=False)
    layer.load_state_dict({name: t for name, t in packed.items() if name != "bias"}, strict=True)
    # AutoGPTQ's forward matmuls in the dtype of the scales, fp16; each product of a scale and an integer of at most nine
    # bits rounds once. Multiplying by the identity adds nothing but zeros to it.
    with torch.no_grad():
        return layer(torch.eye(width, dtype=torch.float16)).T.contiguous()


def add(case, bits, desc_act, zeros, group_size=32, width=64, height=32, bias=False):
    generator = torch.Generator().manual_seed(len(cases))
    size = width if group_size == -1 else group_size
    groups = -(-width // size)
    scales = (torch.rand(height, groups, generator=generator) * 0.04 + 0.01).half().float()
    if zeros == "sym":
        zero = torch.full((height, groups), float(2 ** (bits - 1)))
    else:
        low = 1 if zeros == "asym" else 0
        zero = torch.randint(low, 2**bits, (height, groups), generator=generator).float()
        zero[0, 0], zero[height - 1, -1] = 2**bits - 1, 2**bits - 1  # the ends are there
        if zeros == "zero0":  # a zero point of 0 first, amid and last in a word of zero points
            zero[0, 0], zero[9, 0], zero[31, 0] = 0, 0, 0
    g_idx = torch.arange(width, dtype=torch.int32) // size
    if desc_act:
        g_idx = g_idx[torch.randperm(width, generator=generator)]
    codes = torch.randint(0, 2**bits, (height, width), generator=generator).float()
    linear = torch.nn.Linear(width, height, bias=bias)
    linear.weight.data = scales[:, g_idx.long()] * (codes - zero[:, g_idx.long()])
    if bias:
        linear.bias.data = torch.randn(height, generator=generator)
    linear.half()

    kind = dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=desc_act,
        group_size=group_size,
        bits=bits,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    if width % size:  # qlinear_cuda_old packs a ragged last group, but its forward cannot reshape it
        kind = qlinear_cuda.QuantLinear
    layer = kind(bits, group_size, width, height, bias=bias)
    layer.pack(linear, scales.clone(), zero.clone(), g_idx.clone())
    packed = {name: t.clone().contiguous() for name, t in layer.state_dict().items()}
    assert packed["scales"].dtype == torch.float16, case
    assert torch.equal(packed["g_idx"], g_idx), case
    name = kind.__module__.rsplit(".", 1)[1]
    cases[case] = {
        "bits": bits, "group_size": group_size, "desc_act": desc_act, "sym": zeros == "sym", "in_features": width,
        "out_features": height, "bias": bias, "packed_by": name, "read_by": name,
    }  # fmt: skip
    if zeros == "zero0":
        cases[case]["zeros"] = zero.T.int().tolist()
    found = read(kind, case, packed)
    other = read(qlinear_cuda.QuantLinear, case, packed)
    if zeros != "zero0":  # nothing was lost: bytes hold the codes, readers agree
        assert torch.equal(found, linear.weight.data), case
        assert torch.equal(found, other), case
    tensors.update({f"{case}.{name}": t for name, t in packed.items()})
    tensors[f"{case}.dequantized"] = found
    if not torch.equal(found, other):
        tensors[f"{case}.dequantized_cuda"] = other


for bits in (2, 3, 4, 8):
    for desc_act in (False, True):
        order = "act" if desc_act else "seq"
        for zeros in ("sym", "asym"):
            add(f"w{bits}-{order}-{zeros}", bits, desc_act, zeros)
    add(f"w{bits}-zero0-seq", bits, False, "zero0")
add("w4-zero0-act", 4, True, "zero0")
add("w4-group-1", 4, False, "asym", group_size=-1)
add("w3-group-1-act", 3, True, "sym", group_size=-1)
add("w4-ragged", 4, False, "asym", group_size=64, width=96)
add("w3-ragged-act", 3, True, "asym", group_size=64, width=96)
add("w4-bias-wide", 4, True, "asym", width=96, height=64, bias=True)

save_file(tensors, sys.argv[1], metadata={"library": "auto_gptq 0.7.1", "cases": json.dumps(cases)})
