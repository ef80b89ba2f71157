"""The table of quantizers: python results/quantizers.py MODEL FOLDER [--data TEXT] [--dtype float32] [--windows 60]

Every checkpoint is quantized by `intactkv quantize`, every cell is one run of `intactkv eval` on the same first windows
of ppl_wikitext2; what FOLDER holds already is not done again, so a killed run goes on. The table is
`intactkv report`'s.
Calibration: 32 windows of 512 tokens of --data (WikiText-2's train split), seed 0, plain and behind [BOS]'s KV; for
OmniQuant the first 8 of them in 10 epochs, since it trains on each. Quantizing is done in fp32 whatever --dtype says.
What was calibrated behind the pivot is measured behind it alone.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from intactkv_eval.report.collect import read_run
from intactkv_eval.report.compare import difference

GROUP = 64
_WINDOWS = ["--samples", "32", "--length", "512"]
_TRAINED = ["--samples", "8", "--length", "512", "-o", "epochs=10"]
_STATIC = ["--bits", "8", "--group-size", "-1", "--symmetric", "--act-bits", "8", "--act-scheme", "tensor"]


def checkpoints(data: str) -> dict[str, list[str]]:
    """Name -> arguments of `intactkv quantize`. Names that end in -aware are calibrated behind the pivot."""
    made = {}
    for bits in (4, 3):
        for method in ("gptq", "awq", "omniquant"):
            made[f"{method}-w{bits}"] = ["--method", method, "--bits", str(bits), "--group-size", str(GROUP)]
    made["quarot-w4a4"] = ["--preset", "quarot-w4a4"]
    made["rtn-w8a8-static"] = _STATIC
    plain = {
        name: [*arguments, "--data", data, *(_TRAINED if name.startswith("omniquant") else _WINDOWS)]
        for name, arguments in made.items()
    }
    return plain | {f"{name}-aware": [*arguments, "--pivot", "bos"] for name, arguments in plain.items()}


def cells(model: str, folder: Path, made: Iterable[str]) -> dict[str, str]:
    """Name -> model_args, each without its pivot."""
    found = {"fp": f"pretrained={model}"}
    for bits in (4, 3):
        found[f"rtn-w{bits}"] = f"pretrained={model},weights=rtn,bits={bits},group_size={GROUP}"
    act = "act_bits=4,act_clip=0.9"
    kv = "kv_bits=4,kv_clip=0.95"
    found["rtn-w4a4"] = f"pretrained={model},weights=rtn,bits=4,group_size=-1,symmetric=true,{act},{kv}"
    for name in made:
        extra = f",{kv},kv_rotate=true" if name.startswith("quarot") else ""
        found[name] = f"pretrained={folder / 'models' / name}{extra}"
    for bits in (4, 3, 2):
        for scheme in ("token_head", "channel_key", "pre_rope"):
            found[f"{scheme}-kv{bits}"] = f"pretrained={model},kv_bits={bits},kv_scheme={scheme}"
    return found


def arguments_of(name: str, cell: str, pivot: str, model: str, folder: Path, dtype: str) -> str:
    """The cell with its pivot: a reference for checkpoints, the levels of that pivot for pre_rope."""
    whole = f"{cell},pivot={pivot},dtype={dtype}"
    if cell.startswith(f"pretrained={folder}") and pivot != "none":
        whole += f",reference={model}"
    if name.startswith("pre_rope"):
        whole += f",kv_levels={folder / 'levels' / f'{name}-{pivot}.safetensors'}"
    return whole


def run(*arguments: str) -> None:
    """One command of ours, in a process of its own; the first that fails ends all."""
    print("intactkv", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "intactkv_eval.cli", *arguments], check=True)


def main() -> None:
    """Do what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="wikitext2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    model = str(Path(asked.model).resolve()) if Path(asked.model).is_dir() else asked.model
    folder = asked.folder.resolve()
    made = checkpoints(asked.data)
    for name, cell in cells(model, folder, made).items():
        if asked.only in name:
            _cell(name, cell, model, folder, made, asked)
    run("report", str(folder / "runs"))
    for line in aware_against_plain(folder / "runs"):
        print(line)


def aware_against_plain(runs: Path) -> Iterator[str]:
    """Checkpoints calibrated behind the pivot against the plain ones, both behind it, paired over windows."""
    found = {path.parent.parent.name: path for path in sorted(runs.rglob("results_*.json"))}
    for name in sorted(found):
        plain = name.replace("-aware-bos", "-bos")
        if plain == name or plain not in found:
            continue
        read = (read_run(found[each]) for each in (name, plain))
        one, other = (run.scores["ppl_wikitext2"] for run in read if run is not None)
        change = difference(one, other)
        p = f", p = {change.test.p:.4f}" if change.test and change.test.p is not None else ""
        yield f"{name} {one.value:.4f}, plain {other.value:.4f}: {change.value:+.4f} ± {change.stderr:.4f}{p}"


def _cell(
    name: str, cell: str, model: str, folder: Path, made: dict[str, list[str]], asked: argparse.Namespace
) -> None:
    checkpoint = folder / "models" / name
    if name in made and not checkpoint.is_dir():
        run("quantize", model, "--dtype", "float32", "--out", str(checkpoint), *made[name])
    for pivot in ("bos",) if name.endswith("-aware") else ("none", "bos"):
        levels = folder / "levels" / f"{name}-{pivot}.safetensors"
        if name.startswith("pre_rope") and not levels.is_file():
            written = ["--dtype", asked.dtype, "--out", str(levels), "--data", asked.data, *_WINDOWS]
            run("kv-levels", model, "--bits", name[-1], "--pivot", pivot, *written)
        out = folder / "runs" / f"{name}-{pivot}"
        if not list(out.rglob("results_*.json")):
            run("eval", "--model_args", arguments_of(name, cell, pivot, model, folder, asked.dtype),
                "--tasks", "ppl_wikitext2", "--limit", str(asked.windows), "--batch_size", "1", "--device", "cpu",
                "--log_samples", "--output_path", str(out))  # fmt: skip


if __name__ == "__main__":
    main()
