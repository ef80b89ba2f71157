"""Speed of the packed linear layers against dense torch in the same run, gate first: no ratio on a red gate.

    python kernels/bench.py [--device cpu|cuda] [--size 4096] [--rows 1 512 ...] [--group-size 128] [--markdown FILE]
    python kernels/bench.py --crossover     both ways of the cpu backend: where the one overtakes the other

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

from intactkv_eval.errors import ConfigError
from intactkv_eval.model.devices import check_device
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_kernels import cpu
from intactkv_kernels.native import has_planes, library
from intactkv_kernels.reference import quantized_linear

GATE = 8e-3  # relative RMS, bf16: the tolerance of the tests
BEYOND_CACHE = 256 * 2**20  # bytes of weights to walk round
CROSSOVER_ROWS = (8, 16, 24, 32, 48, 64)


def main() -> None:
    """Measure, print, and write where asked."""
    asked = _arguments()
    torch.manual_seed(0)
    if asked.crossover:
        head = [
            _heading(asked),
            "",
            "| bits | rows | dense ms | packed product ms | tiles ms |",
            "| ---: | ---: | ---: | ---: | ---: |",
        ]
        _report(asked, "crossover", [*head, *(line for bits in asked.bits for line in _crossover(asked, bits))])
        return
    lines = [_heading(asked), "", "| bits | rows | dense ms | packed ms | times dense's speed | error |",
             "| ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for bits in asked.bits:
        for rows in asked.rows:
            lines.append(_line(asked, bits, rows))
            print(lines[-1], flush=True)
    _report(asked, "bench", lines)


def _crossover(asked: argparse.Namespace, bits: int) -> list[str]:
    """Rows of x against dense, the layout's own product and dequantized tiles, whichever `cpu` would choose."""
    size = asked.size
    weight = quantize_rtn((torch.randn(size, size) / size**0.5).to(torch.float16), bits, asked.group_size)
    parts = weight.unpacked(), weight.scales, weight.zeros, bits, weight.group_size
    packed = [cpu.prepare(*parts) for _ in range(_copies(size * size * _bits_held(bits, "cpu") // 8))]
    dense = [weight.dequantize(torch.bfloat16) for _ in range(_copies(size * size * 2))]
    lines = []
    for rows in CROSSOVER_ROWS:
        x = torch.randn(rows, size).to(torch.bfloat16)
        rivals: list[Callable[[int], Tensor]] = [
            lambda turn, x=x: F.linear(x, dense[turn % len(dense)]),  # type: ignore[misc]
            lambda turn, x=x: packed[turn % len(packed)].few_rows(x),  # type: ignore[misc]
            lambda turn, x=x: cpu.many_rows(x, packed[turn % len(packed)]),  # type: ignore[misc]
        ]
        times = [median(part) for part in _milliseconds(rivals, asked.repeats, "cpu")]
        lines.append(f"| {bits} | {rows} | {times[0]:.2f} | {times[1]:.2f} | {times[2]:.2f} |")
        print(lines[-1], flush=True)
    return lines


def _copies(size: int) -> int:
    return max(2, -(-BEYOND_CACHE // size))


def _bits_held(bits: int, device: str) -> int:
    """Bits a code takes: torch's containers hold 2 and 3 in 4."""
    return 4 if bits < 8 and device == "cpu" and not has_planes() else bits


def _line(asked: argparse.Namespace, bits: int, rows: int) -> str:
    size, device = asked.size, asked.device
    matrix = (torch.randn(size, size) / size**0.5).to(torch.float16)
    weight = quantize_rtn(matrix, bits, asked.group_size).to(torch.device(device))
    packed_copies, dense_copies = _copies(size * size * _bits_held(bits, device) // 8), _copies(size * size * 2)
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
    compiled = (
        ""
        if on_gpu
        else f", in {'planes' if has_planes() else 'containers'}, {'with' if library() else 'without'} a C compiler"
    )
    return (
        f"{asked.size} x {asked.size}, groups of {asked.group_size}, bf16, {where} ({platform.machine()}){compiled}, "
        f"torch {torch.__version__}, medians of {asked.repeats} turns, ratios within a turn"
    )


def _report(asked: argparse.Namespace, name: str, lines: list[str]) -> None:
    """Print; and put between the markers of that name where a file is asked for."""
    table = "\n".join(lines)
    print(table)
    if asked.markdown:
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = asked.markdown.read_text(encoding="utf-8").partition(begin)
        after = rest.partition(end)[2]
        asked.markdown.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")


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
    parser.add_argument("--crossover", action="store_true")
    asked = parser.parse_args()
    try:
        check_device(asked.device, "--device ")
    except ConfigError as error:
        parser.error(str(error))
    return asked


if __name__ == "__main__":
    main()
