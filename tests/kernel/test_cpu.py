"""The CPU kernel's other paths: without a compiler, on a narrower processor, and with poisoned memory."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from tolerances import RELATIVE_RMS, relative_rms
from torch.nn import functional as F

from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_kernels import cpu, native


def packed(bits, outputs=600, inputs=192, group=64):
    torch.manual_seed(bits)
    weight = quantize_rtn(torch.randn(outputs, inputs).to(torch.float16), bits, group)
    return weight, cpu.prepare(weight.unpacked(), weight.scales, weight.zeros, bits, group)


@pytest.fixture
def poisoned():
    """Memory that torch hands out is full of NaN, and so is the scratch that the kernel keeps."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    for dtype in (torch.bfloat16, torch.float32):
        cpu._room(192 * cpu.TILE, dtype).fill_(float("nan"))
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 40])
def test_poisoned_memory_does_not_show(bits, rows, poisoned):
    weight, made = packed(bits)
    x = torch.randn(rows, 192).to(torch.bfloat16)
    assert torch.empty(3).isnan().all()
    expected = F.linear(x.double(), weight.dequantize(torch.float64))
    assert relative_rms(cpu.linear(x, made), expected) < RELATIVE_RMS[torch.bfloat16]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_a_compiler_the_weights_are_the_same(bits, dtype, monkeypatch):
    _, made = packed(bits)
    if native.library() is None:
        pytest.skip("there is no C compiler here, so there is nothing to compare with")
    by_c = cpu.dequantize(made, dtype)
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert torch.equal(cpu.dequantize(made, dtype), by_c)


def test_scratch_of_inference_mode_serves_outside_of_it(monkeypatch):
    monkeypatch.setattr(cpu, "library", lambda: None)
    monkeypatch.setattr(cpu, "_SCRATCH", threading.local())
    _, made = packed(4)
    x = torch.randn(300, 192)
    with torch.inference_mode():
        inside = cpu.linear(x, made)
    with torch.no_grad():
        assert torch.equal(cpu.linear(x, made), inside)


def test_a_compiler_that_fails_is_reported_and_done_without(monkeypatch, tmp_path, caplog):
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such luck >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "no such luck" in caplog.text
        assert not list((tmp_path / "kernels").glob("*"))
    finally:
        native.library.cache_clear()


@pytest.mark.skipif(cpu.container_block() != 64, reason="this processor has no wider vectors than those to be tried")
def test_a_processor_with_narrower_vectors(tmp_path):
    """torch packs in blocks of 32 there; the same tests in a process that is told so."""
    program = (
        "import torch; from intactkv_kernels import cpu; from intactkv_eval.quantize.rtn import quantize_rtn\n"
        "w = quantize_rtn(torch.randn(100, 128).half(), 3, 64)\n"
        "p = cpu.prepare(w.unpacked(), w.scales, w.zeros, 3, 64)\n"
        "assert torch.equal(cpu.dequantize(p, torch.bfloat16), w.dequantize(torch.bfloat16))\n"
        "assert torch.equal(cpu.codes_of(p), w.unpacked())\n"
        "x = torch.randn(2, 128).bfloat16(); y = x.double() @ w.dequantize(torch.float64).T\n"
        "assert (cpu.linear(x, p) - y).norm() < 8e-3 * y.norm(); print(cpu.container_block())"
    )
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "32"
