"""The CPU kernel in both of its layouts: every shape, dtype and path against the formula, and poisoned memory."""

import os
import subprocess
import sys

import pytest
import torch
from helpers.tolerances import RELATIVE_RMS, relative_rms
from torch.nn import functional as F

from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_kernels import containers, cpu, native, planes, scratch
from intactkv_kernels.containers import ContainerWeight
from intactkv_kernels.cpu_layer import CpuLinear
from intactkv_kernels.parts import Parts
from intactkv_kernels.planes import PlanesWeight
from intactkv_kernels.reference import quantized_linear

BITS = [2, 3, 4, 8]
NO_PLANES = "planes need a C compiler and a processor with AVX-512 and bf16"


@pytest.fixture(params=[PlanesWeight, ContainerWeight], ids=["planes", "containers"])
def layout(request, monkeypatch):
    """Each layout in turn, as `cpu` would choose it on a machine of its kind."""
    if request.param is PlanesWeight and not native.has_planes():
        pytest.skip(NO_PLANES)
    monkeypatch.setattr(cpu, "has_planes", lambda: request.param is PlanesWeight)
    assert cpu.layout() is request.param
    return request.param


@pytest.fixture
def poisoned():
    """Memory that torch hands out is full of NaN, and so is the scratch that the kernel keeps."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype in (torch.bfloat16, torch.float32):
        scratch.room(192 * planes.TILE, dtype).fill_(float("nan"))
    yield
    torch.use_deterministic_algorithms(False)


def formula(bits, outputs, inputs, group, dtype=torch.float16):
    """codes, scales and zeros at random, every code and zero among them."""
    generator = torch.Generator().manual_seed(bits + inputs)
    groups = -(-inputs // group)
    codes, zeros = (
        torch.randint(0, 2**bits, (outputs, n), generator=generator).to(torch.uint8) for n in (inputs, groups)
    )
    return codes, (torch.rand(outputs, groups, generator=generator) / 100 + 1e-3).to(dtype), zeros


def packed(bits, outputs=600, inputs=192, group=64):
    torch.manual_seed(bits)
    weight = quantize_rtn(torch.randn(outputs, inputs).to(torch.float16), bits, group)
    return weight, cpu.prepare(weight.unpacked(), weight.scales, weight.zeros, bits, group)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("outputs", "inputs", "group"),
    [(37, 576, 64), (37, 256, 32), (70, 384, 128), (5, 768, 256), (33, 576, 576), (17, 1024, 1024), (1, 96, 96),
     (19, 160, 128), (513, 64, 32), (16, 128, 64)],
)  # fmt: skip
@pytest.mark.parametrize("scale", [torch.float16, torch.bfloat16, torch.float32])
def test_every_shape_and_number_of_rows(layout, bits, outputs, inputs, group, scale):
    codes, scales, zeros = formula(bits, outputs, inputs, group, scale)
    weight = cpu.prepare(codes, scales, zeros, bits, group)
    assert isinstance(weight, layout)
    assert torch.equal(weight.unpacked(), codes)
    matrix = quantized_linear(torch.eye(inputs), codes, scales, zeros, group).t()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert torch.equal(cpu.dequantize(weight, dtype), matrix.to(dtype))
    for rows in (1, 2, 3, 4, 5, 7, 17, 64, 300):
        x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(rows)).to(torch.bfloat16)
        expected = quantized_linear(x, codes, scales, zeros, group)
        for found in (weight.few_rows(x), cpu.many_rows(x, weight)):  # whichever `linear` would choose
            assert relative_rms(found, expected) < RELATIVE_RMS[torch.bfloat16]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 6, 90])
def test_bias_and_act_order(layout, bits, dtype, rows):
    codes, scales, zeros = formula(bits, 45, 192, 64)
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    weight = cpu.prepare(codes, scales, zeros, bits, 64, order)
    x, bias = torch.randn(rows, 192).to(dtype), torch.randn(45).to(dtype)
    found = cpu.linear(x.view(rows, 1, 192), weight, bias)
    assert found.shape == (rows, 1, 45)
    assert found.dtype is dtype
    expected = quantized_linear(x[:, order.long()], codes, scales, zeros, 64, bias)
    assert relative_rms(found.view(rows, 45), expected) < RELATIVE_RMS[dtype]
    assert relative_rms(F.linear(x.float(), cpu.dequantize(weight, torch.float32), bias.float()), expected) < 1e-6


@pytest.mark.parametrize("bits", BITS)
def test_a_row_of_a_batch_is_that_row_alone(layout, bits):
    _, made = packed(bits)
    x = torch.randn(23, 192).to(torch.bfloat16)
    batch = cpu.linear(x, made)
    assert torch.equal(cpu.linear(x, made), batch)
    for row in range(len(x)):
        assert relative_rms(batch[row], cpu.linear(x[row], made)) < RELATIVE_RMS[torch.bfloat16]


@pytest.mark.parametrize("bits", BITS)
def test_x_that_is_no_contiguous_matrix(layout, bits):
    _, made = packed(bits)
    x = torch.randn(192, 3).to(torch.bfloat16).t()
    assert torch.equal(cpu.linear(x, made), cpu.linear(x.contiguous(), made))
    assert cpu.linear(x[:0], made).shape == (0, 600)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_poisoned_memory_does_not_show(layout, bits, rows, poisoned):
    weight, made = packed(bits)
    x = torch.randn(rows, 192).to(torch.bfloat16)
    assert torch.empty(3).isnan().all()
    expected = F.linear(x.double(), weight.dequantize(torch.float64))
    assert relative_rms(cpu.linear(x, made), expected) < RELATIVE_RMS[torch.bfloat16]
    assert relative_rms(made.few_rows(x), expected) < RELATIVE_RMS[torch.bfloat16]


def layer_of(bits, order=None):
    codes, scales, zeros = formula(bits, 40, 192, 64)
    parts = Parts(codes, scales, zeros, order, bits, 64, 192, lambda words: words, None, None)
    return CpuLinear(parts, torch.bfloat16), quantized_linear(torch.eye(192), codes, scales, zeros, 64).t()


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_x_and_the_compiled_layer(layout, bits):
    layer, matrix = layer_of(bits)
    x = torch.randn(3, 192, requires_grad=True)
    layer(x, None).square().sum().backward()
    expected = torch.autograd.grad(F.linear(x, matrix).square().sum(), x)[0]
    assert relative_rms(x.grad, expected) < RELATIVE_RMS[torch.float32]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    few, bias = torch.randn(2, 1, 192).to(torch.bfloat16), torch.randn(40).to(torch.bfloat16)
    assert torch.equal(compiled(few, bias), layer(few, bias))


def test_a_layer_keeps_its_tensors_through_a_copy_and_is_not_cast(layout):
    layer, _ = layer_of(3, torch.arange(192).flip(0).to(torch.int32))
    x = torch.randn(2, 192).to(torch.bfloat16)
    moved = layer._apply(lambda tensor: tensor.clone())
    assert moved._weight.scales is moved.scales
    assert moved._weight.order is moved.order
    assert torch.equal(moved(x, None), layer_of(3, layer.tensors()["order"])[0](x, None))
    with pytest.raises(RuntimeError, match="cannot be cast"):
        layer.to(torch.bfloat16)


def test_scratch_of_inference_mode_serves_outside_of_it(layout):
    _, made = packed(4, inputs=1056, group=32)  # more than any other test here asks for
    for rows in (20, 300):
        x = torch.randn(rows, 1056).to(torch.bfloat16)
        with torch.inference_mode():
            inside = cpu.linear(x, made)
        with torch.no_grad():
            assert torch.equal(cpu.linear(x, made), inside)


@pytest.mark.skipif(not native.has_planes(), reason=NO_PLANES)
def test_large_planes_lie_at_a_huge_page(monkeypatch):
    monkeypatch.setattr(planes, "HUGE", 2**16)
    codes, scales, zeros = formula(3, 300, 1024, 128)
    weight = PlanesWeight.prepare(codes, scales, zeros, 3, 128, None)
    assert weight.codes.numel() > planes.HUGE
    assert weight.codes.data_ptr() % planes.HUGE == 0
    assert torch.equal(weight.unpacked(), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_compiler_the_weights_are_the_same(bits, dtype, monkeypatch):
    monkeypatch.setattr(cpu, "has_planes", lambda: False)
    _, made = packed(bits)
    if native.library() is None:
        pytest.skip("there is no C compiler here, so there is nothing to compare with")
    by_c = cpu.dequantize(made, dtype)
    monkeypatch.setattr(containers, "library", lambda: None)
    assert torch.equal(cpu.dequantize(made, dtype), by_c)


def test_a_compiler_that_fails_is_reported_and_done_without(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert cpu.layout() is ContainerWeight
        assert "no such luck" in caplog.text
        assert not list((tmp_path / "kernels").glob("*"))
    finally:
        native.library.cache_clear()


@pytest.mark.skipif(
    containers.container_block() != 64, reason="this processor has no wider vectors than those to be tried"
)
def test_a_processor_with_narrower_vectors():
    """torch packs in blocks of 32 there; the same tests in a process that is told so."""
    program = (
        "import torch; from intactkv_kernels import containers, cpu\n"
        "from intactkv_eval.quantize.rtn import quantize_rtn\n"
        "w = quantize_rtn(torch.randn(100, 128).half(), 3, 64)\n"
        "p = containers.ContainerWeight.prepare(w.unpacked(), w.scales, w.zeros, 3, 64, None)\n"
        "assert torch.equal(cpu.dequantize(p, torch.bfloat16), w.dequantize(torch.bfloat16))\n"
        "assert torch.equal(p.unpacked(), w.unpacked())\n"
        "x = torch.randn(2, 128).bfloat16(); y = x.double() @ w.dequantize(torch.float64).T\n"
        "assert (cpu.linear(x, p) - y).norm() < 8e-3 * y.norm(); print(containers.container_block())"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "32"
