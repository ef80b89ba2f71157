"""Speed of the packed linear layers against dense torch in the same run, gate first: no ratio on a red gate.

    python kernels/bench.py [--device cpu|cuda] [--size 4096] [--rows 1 512 ...] [--group-size 128] [--markdown FILE]

Each measurement walks round as many copies of the weight as no cache holds, as the layers of a model would. The gate is
the relative RMS error against the fp32 reference. With --markdown the table is put between the markers of that file.
"""

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_kernels.native import library
from intactkv_kernels.reference import quantized_linear

GATE = 8e-3  # relative RMS, bf16: the tolerance of the tests
BEYOND_CACHE = 256 * 2**20  # bytes of weights to walk round
MARKERS = ("<!-- bench -->", "<!-- /bench -->")


def main() -> None:
    """Measure, print, and write where asked."""
    asked = _arguments()
    torch.manual_seed(0)
    lines = [_heading(asked), "", "| bits | rows | dense ms | packed ms | times dense's speed | error |",
             "| ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for bits in asked.bits:
        for rows in asked.rows:
            lines.append(_line(asked, bits, rows))
            print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if asked.markdown:
        _put(asked.markdown, table)


def _line(asked: argparse.Namespace, bits: int, rows: int) -> str:
    size, device = asked.size, asked.device
    matrix = (torch.randn(size, size) / size**0.5).to(torch.float16)
    weight = quantize_rtn(matrix, bits, asked.group_size).to(torch.device(device))
    packed_bytes = size * size * (4 if bits < 8 and device == "cpu" else bits) // 8
    dense_copies = max(2, -(-BEYOND_CACHE // (size * size * 2)))
    packed_copies = max(2, -(-BEYOND_CACHE // packed_bytes))
    layers = [QuantizedLinear(weight, None, torch.bfloat16, asked.backend) for _ in range(packed_copies)]
    dense = [weight.dequantize(torch.bfloat16) for _ in range(dense_copies)]
    x = torch.randn(rows, size, device=device).to(torch.bfloat16)
    error = _error(layers[0], weight.unpacked(), weight.scales, weight.zeros, x)
    if not error < GATE:
        return f"| {bits} | {rows} | | | red gate | {error:.1e} |"
    rivals: list[Callable[[int], Tensor]] = [
        lambda turn: F.linear(x, dense[turn % dense_copies]),
        lambda turn: layers[turn % packed_copies](x),
    ]
    slow, fast = _milliseconds(rivals, asked.repeats, device)
    ratio = median(one / other for one, other in zip(slow, fast, strict=True))
    return f"| {bits} | {rows} | {median(slow):.2f} | {median(fast):.2f} | {ratio:.2f} | {error:.1e} |"


def _error(layer: nn.Module, codes: Tensor, scales: Tensor, zeros: Tensor, x: Tensor) -> float:
    expected = quantized_linear(x[:64], codes, scales, zeros, codes.shape[1] // scales.shape[1])
    found = layer(x)[:64].float()
    return float((found - expected).norm() / expected.norm())


def _milliseconds(rivals: list[Callable[[int], Tensor]], repeats: int, device: str) -> list[list[float]]:
    """Of each rival, taken in turns: neighbours in time are compared, so that a slow spell strikes both."""
    times: list[list[float]] = [[] for _ in rivals]
    with torch.inference_mode():
        for turn in range(-3, repeats):
            for place, rival in enumerate(rivals):
                _wait(device)
                start = time.perf_counter()
                rival(turn)
                _wait(device)
                if turn >= 0:
                    times[place].append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _heading(asked: argparse.Namespace) -> str:
    on_gpu = asked.device.startswith("cuda")
    where = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
    compiled = "" if on_gpu else f", {'with' if library() else 'without'} a C compiler"
    return (
        f"{asked.size} x {asked.size}, groups of {asked.group_size}, bf16, {where} ({platform.machine()}){compiled}, "
        f"torch {torch.__version__}, medians of {asked.repeats} turns, ratios within a turn"
    )


def _put(file: Path, table: str) -> None:
    text = file.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKERS[0])
    _, _, after = rest.partition(MARKERS[1])
    file.write_text(f"{before}{MARKERS[0]}\n{table}\n{MARKERS[1]}{after}", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 512])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
