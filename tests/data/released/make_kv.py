"""Numbers that the released code of IntactKV, QuaRot and KIVI makes of keys and values: kv.safetensors.

IntactKV is github.com/ruikangliu/IntactKV, QuaRot github.com/spcl/QuaRot, KIVI github.com/jy-yuan/KIVI, each at the
commit in COMMITS, which is checked and written into the file's metadata.

Made on a CPU with Python 3.11, torch 2.13.0, triton 3.7.1, transformers 4.43.4, tokenizers 0.19.1, huggingface_hub 0.25.2:
    TRITON_INTERPRET=1 OMP_NUM_THREADS=1 python make_kv.py INTACTKV QUAROT KIVI kv.safetensors
where the first three are checkouts of the repositories above. Their code is imported and run as it is. What needs CUDA
and is replaced here:
  fast_hadamard_transform   QuaRot's package for CUDA: a product with Sylvester's matrix in fp64. The keys are multiples of
                            1/256 and small, so that every order of summation gives the same fp32 numbers.
  kivi_gemv                 KIVI's CUDA extension, only imported.
  cuda_bmm_fA_qB_outer      KIVI's product of attention with packed rows: KIVI's own unpack_tensor, then codes * scale +
                            minimum in fp32 and a matrix product.
  torch.cuda.device         does nothing, and KIVI's packing runs in triton's interpreter.

Tensors (fp32 unless named otherwise):
  token_head.rows [1, 2, 16, 64]        rows of every kind: usual, far from zero, tiny, huge, equal, zero
  token_head.<bits>                     IntactKV's UniformAffineQuantizer(bits, symmetric=False)
  token_head.float16.4, .bfloat16.4     the same in 16 bits, of the usual rows [1, 2, 8, 64] (fp32 numbers of that dtype)
  quarot.rows [1, 2, 9, 64]             queries and keys behind RoPE
  quarot.turned                         keys behind QuaRot's Hadamard transform
  quarot.keys.<bits>.<clip>             what QKRotationWrapper returns for keys (k_groupsize = head_dim, asymmetric)
  quarot.values.<bits>.<clip>           ActQuantizer (v_groupsize = head_dim = 64, asymmetric) of the same rows as [1, 9, 128]
  quarot.values.equal                   the same of a group of equal numbers, 4 bits, clip 1
  kivi.keys, kivi.values [1, 2, 44, 16] rows that LlamaAttention_KIVI projects (keys behind RoPE), and kivi.queries
  kivi.<bits>.keys, .values             what stands in its cache after 44 tokens, dequantized (group 8, residual 16)
  kivi.<bits>.seen [32, 32]             attention of the queries of tokens 12 to 43, decoded one by one behind a prompt of 12
  kivi.lengths [45, 2]                  of 0 to 44 tokens, how many keys and how many values are quantized, decoded or not
"""

import importlib.util
import subprocess
import sys
import types
from contextlib import nullcontext

import torch
from safetensors.torch import save_file

COMMITS = {
    "IntactKV": "e9b841e9357c59ed800620373454110fc52fbfe4",
    "QuaRot": "5008669b08c1f11f9b64d52d16fddd47ca754c5a",
    "KIVI": "876b4d2d08e3b1d5f70d0969c299d8c7c42ddfb6",
}
BITS, CLIPS = (2, 3, 4, 8), (1.0, 0.95)
GROUP, RESIDUAL, TOKENS, PROMPT = 8, 16, 44, 12
tensors = {}


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stub(name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    sys.modules[name] = module


def file_of(path):
    """A module of a file, under a name of its own: all three repositories have a package `utils`."""
    spec = importlib.util.spec_from_file_location("released", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(name, tensor):
    tensors[name] = tensor.detach().clone().contiguous()


def token_head(repository):
    quantizer = file_of(f"{repository}/utils/quantizer.py").UniformAffineQuantizer
    rows = draw(0, 1, 2, 16, 64)
    rows[:, :, 3, 5] *= 30  # a channel that stands out
    rows[:, :, 4] += 5  # no zero in the range
    rows[:, :, 5] -= 5
    rows[:, :, 6] *= 0.05
    rows[:, :, 8] *= 1e-6  # a step below the smallest
    rows[:, :, 9] *= 1e6  # and one above the largest
    rows[:, :, 10] = 1000 + rows[:, :, 10] * 1e-3  # a zero point beyond the bound
    rows[:, :, 11] = 0
    rows[:, :, 12] = 0.05
    rows[:, :, 13] = -0.5
    rows[:, :, 14] = rows[:, :, 14].abs()
    put("token_head.rows", rows)
    for bits in BITS:
        put(f"token_head.{bits}", quantizer(bits, symmetric=False)(rows))
    for dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        put(f"token_head.{name}.4", quantizer(4, symmetric=False)(rows[:, :, :8].to(dtype)).float())


def quarot(repository):
    def hadamard_transform(x, scale):
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < x.shape[-1]:
            matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
        return (x.double() @ matrix * scale).to(x.dtype)

    stub("fast_hadamard_transform", hadamard_transform=hadamard_transform)
    sys.path.insert(0, f"{repository}/fake_quant")
    import quant_utils
    import rotation_utils

    config = types.SimpleNamespace(num_attention_heads=2, hidden_size=128)
    rows = draw(1, 1, 2, 9, 64)
    rows[:, :, 3, 5] *= 30
    rows[:, :, 4] += 5
    rows[:, :, 5] -= 5
    rows[:, :, 6] *= 0.05
    rows[:, :, 7] = 0
    rows[:, :, 8, 1:] = 0  # its transform has one sign, or one number: zero is at the end of the range
    rows = torch.round(rows * 256) / 256
    put("quarot.rows", rows)
    for bits in BITS:
        for clip in CLIPS:
            settings = {"k_bits": bits, "k_groupsize": 64, "k_sym": False, "k_clip_ratio": clip}
            wrapper = rotation_utils.QKRotationWrapper(lambda q, k: (q, k), config, **settings)
            turned, keys = wrapper(rows, rows)
            put("quarot.turned", turned)
            put(f"quarot.keys.{bits}.{clip:g}", keys)
            quantizer = quant_utils.ActQuantizer()
            quantizer.configure(bits, groupsize=64, sym=False, clip_ratio=clip)
            flat = rows.transpose(1, 2).reshape(1, 9, 128)
            flat[:, 8] = flat[:, 0]  # no row of equal numbers but zeros here
            quantizer.find_params(flat)
            put(f"quarot.values.{bits}.{clip:g}", quantizer(flat))
    quantizer.configure(4, groupsize=64, sym=False)
    equal = torch.full((1, 1, 64), 0.3)
    quantizer.find_params(equal)
    put("quarot.values.equal", quantizer(equal))


def kivi(repository):
    sys.modules.pop("utils")  # QuaRot's
    stub("kivi_gemv")
    sys.path.insert(0, repository)
    torch.cuda.device = lambda device: nullcontext()
    from models import llama_kivi
    from quant.new_pack import unpack_tensor

    def dequantized(codes, scales, minima, bits):
        groups = unpack_tensor(codes, bits, 3).float().unflatten(-1, (-1, GROUP))
        return (groups * scales[..., None] + minima[..., None]).flatten(-2)

    llama_kivi.cuda_bmm_fA_qB_outer = lambda group, rows, codes, scales, minima, bits: (
        rows @ dequantized(codes, scales, minima, bits)
    )
    rotary = llama_kivi.apply_rotary_pos_emb
    turned = []
    llama_kivi.apply_rotary_pos_emb = lambda *args: turned.append(rotary(*args)) or turned[-1]
    hidden = torch.round(draw(2, 1, TOKENS, 32) * 64) / 64  # and weights alike: exact however many rows are multiplied
    lengths = None
    for bits in (2, 4):
        torch.manual_seed(3)
        config = llama_kivi.LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
        vars(config).update(k_bits=bits, v_bits=bits, group_size=GROUP, residual_length=RESIDUAL, use_flash=True)
        layer = llama_kivi.LlamaAttention_KIVI(config)
        layer.o_proj = torch.nn.Identity()
        for linear in (layer.q_proj, layer.k_proj, layer.v_proj):
            linear.weight.copy_(torch.round(linear.weight * 1024) / 1024)

        def run(first, stop, past, layer=layer):
            positions = torch.arange(first, stop)[None]
            mask = None
            if past is None:
                mask = torch.full((stop, stop), torch.finfo(torch.float32).min).triu(1)[None, None]
            return layer(hidden[:, first:stop], mask, positions, past, use_cache=True)

        put("kivi.values", layer.v_proj(hidden).unflatten(-1, (2, 16)).transpose(1, 2))
        cases, seen = [(0, 0)], []
        for stop in range(1, TOKENS + 1):  # as a prompt
            out, _, past = run(0, stop, None)
            cases.append(quantized_rows(past))
        put("kivi.queries", turned[-1][0])
        put("kivi.keys", turned[-1][1])
        full = torch.nn.functional.scaled_dot_product_attention(
            turned[-1][0], turned[-1][1], tensors["kivi.values"], is_causal=True
        )
        assert torch.allclose(out, full.transpose(1, 2).flatten(2), atol=1e-6), "the prompt itself sees rows in full"
        put(f"kivi.{bits}.keys", whole(past[1], dequantized(*past_keys(past), bits).transpose(2, 3)))
        put(f"kivi.{bits}.values", whole(past[5], dequantized(past[4], past[6], past[7], bits)))
        past = run(0, PROMPT, None)[2]
        for place in range(PROMPT, TOKENS):  # one by one
            out, _, past = run(place, place + 1, past)
            seen.append(out[0, 0])
            assert quantized_rows(past) == cases[place + 1], "decoding leaves what a prompt of as many tokens does"
        assert torch.equal(whole(past[5], dequantized(past[4], past[6], past[7], bits)), tensors[f"kivi.{bits}.values"])
        put(f"kivi.{bits}.seen", torch.stack(seen))
        assert lengths in (None, cases)
        lengths = cases
    put("kivi.lengths", torch.tensor(lengths))


def past_keys(past):
    return past[0], past[2], past[3]


def quantized_rows(past):
    """How many keys and values are quantized."""
    return (past[8] - (0 if past[1] is None else past[1].shape[2]), past[8] - past[5].shape[2])


def whole(full, quantized):
    return quantized if full is None else torch.cat([quantized, full], dim=2)


for name, repository in zip(COMMITS, sys.argv[1:4], strict=True):
    head = subprocess.run(["git", "-C", repository, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert head.stdout.strip() == COMMITS[name], f"{name}: {repository} is at another commit"
with torch.no_grad():
    token_head(sys.argv[1])
    quarot(sys.argv[2])
    kivi(sys.argv[3])
save_file(tensors, sys.argv[4], metadata=COMMITS)
