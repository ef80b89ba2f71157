"""The works that are killed: what is run, and what its end must be. Each in a folder of its own."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from intactkv_eval.bench.report import write_results
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.pivot.prefix_file import PrefixFile
from intactkv_eval.report.collect import read_run
from intactkv_eval.report.figure_numbers import read_numbers
from intactkv_eval.weights.checkpoint import Checkpoint

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all today. "
WORKS = ("pivots", "figures", "kv-codebook", "report", "capture", "quantize", "calibrate", "eval", "judge", "sweep")
TASK = {"task": "intactkv_demo_ppl", "limit": 8, "metadata": {"ppl_window": 64}}


@dataclass
class Work:
    """arguments: of `intactkv`, in a folder. end: the digests of what it made, once whole; None before.

    `end` reads what is there as its user would: half a file that is taken for a whole one fails there.
    """

    arguments: Callable[[Path], list[str]]
    end: Callable[[Path], Mapping[str, str] | None]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def works(model: Path, server_url: str, bench: Path, answers: Sequence[Path]) -> dict[str, Work]:
    """All of them, for the small model in `model`."""
    text = model.parent / "text.txt"
    text.write_text(TEXT * 300)
    talks = model.parent / "talks.jsonl"
    lines = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} {TEXT}"[:50]}] for n in range(12)
    ]
    talks.write_text("\n".join(json.dumps({"messages": one}) for one in lines))
    cell = f"pretrained={model},weights=rtn,bits=3,group_size=32,pivot=bos"
    demo = ["--tasks", "intactkv_demo_qa", "--limit", "24", "--log_samples", "--device", "cpu"]
    gptq = [
        "--method",
        "gptq",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--data",
        str(text),
        "--samples",
        "48",
        "--length",
        "96",
    ]
    training = [
        "--max-tokens",
        "96",
        "--min-assistant-tokens",
        "10",
        "--batch-size",
        "4",
        "--epochs",
        "3",
        "--learning-rate",
        "2e-3",
    ]
    judging = ["--model", "judge", "--base-url", server_url, "--questions", str(bench), "--baseline", str(answers[1])]

    def sweep(folder: Path) -> list[str]:
        grid = {"models": [str(model)], "weights": [{}, {"weights": "rtn", "bits": 3, "group_size": 32}],
                "kv": [{}, {"kv_bits": 4}, {"kv_bits": 2}], "tasks": [TASK]}  # fmt: skip
        (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
        return ["sweep", str(folder / "grid.yaml"), "--out", str(folder / "sweep")]

    results = model.parent / "results"
    write_results(results, 40, 3)
    texts = ["--samples", "6", "--length", "48", "--seed", "1"]

    return {
        "pivots": Work(
            lambda folder: ["pivots", str(model), "--data", str(text), *texts, "--max-prefix-tokens", "3", "--out", str(folder / "prefix.json")],
            lambda folder: _read_by(PrefixFile.load, folder / "prefix.json"),
        ),
        "figures": Work(
            lambda folder: ["figures", "--model_args", cell, "--data", str(text), *texts, "--formats", "svg,png", "--out", str(folder / "figures")],
            lambda folder: _drawn(folder / "figures"),
        ),
        "kv-codebook": Work(
            lambda folder: ["kv-codebook", str(model), "--data", str(text), *texts, "--out", str(folder / "codebook.safetensors")],
            lambda folder: _read_by(Codebook.load, folder / "codebook.safetensors"),
        ),
        "report": Work(
            lambda folder: ["report", str(results), "--out", str(folder / "report.html")],
            lambda folder: _files(folder, "report.html"),
        ),
        "capture": Work(
            lambda folder: ["capture", str(model), "--pivot", "tokens:256+72+73", "--out", str(folder / "pivot.safetensors")],
            lambda folder: _files(folder, "pivot.safetensors"),
        ),
        "quantize": Work(
            lambda folder: ["quantize", str(model), *gptq, "--out", str(folder / "quantized")],
            lambda folder: _files(folder / "quantized", "*") if _is_whole(folder / "quantized") else None,
        ),
        "calibrate": Work(
            lambda folder: ["calibrate", "--model_args", cell, "--data", str(talks), *training, "--out", str(folder / "c.safetensors")],
            lambda folder: _files(folder, "c.safetensors"),
        ),
        "eval": Work(
            lambda folder: ["eval", "--model_args", cell, *demo, "--use_cache", str(folder / "responses"), "--output_path", str(folder / "out")],
            lambda folder: _figures(folder / "out"),
        ),
        "judge": Work(
            lambda folder: ["judge", str(answers[0]), *judging, "--out", str(folder / "judged")],
            lambda folder: _judged(folder / "judged"),
        ),
        "sweep": Work(sweep, lambda folder: _figures(folder / "sweep" / "cells")),
    }  # fmt: skip


def _files(folder: Path, pattern: str) -> dict[str, str] | None:
    found = {path.name: digest(path) for path in sorted(folder.glob(pattern)) if path.is_file()}
    return found or None


def _read_by(read: Callable[[Path], object], path: Path) -> dict[str, str] | None:
    """A file that its reader takes."""
    if not path.is_file():
        return None
    read(path)
    return {path.name: digest(path)}


def _drawn(folder: Path) -> dict[str, str] | None:
    """Figures and their numbers; who reads only words and numbers that are of one run finds them so."""
    if not (folder / "figures.npz").exists():
        return None
    numbers, told = read_numbers(folder / "figures.npz")
    assert numbers
    assert json.loads((folder / "figures.json").read_text())["numbers_sha256"] == told
    return _files(folder, "[!.]*")


def _is_whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    checkpoint = Checkpoint(folder)
    checkpoint.read(checkpoint.names)
    return bool(json.loads((folder / "config.json").read_text())["quantization_config"])


def _figures(folder: Path) -> dict[str, str] | None:
    """Every sample's figures, by what was run."""
    found = {}
    for path in sorted(folder.rglob("results_*.json")) if folder.is_dir() else []:
        run = read_run(path)
        for score in run.scores.values():
            values = {str(place): value for place, value in score.values.items()}
            found[f"{run.identity} {score.task}"] = json.dumps([score.value, values])
    return found or None


def _judged(folder: Path) -> dict[str, str] | None:
    found = {}
    for path in sorted((folder / "model_judgment").glob("*.jsonl")) if folder.is_dir() else []:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.name] = json.dumps(
            sorted(json.dumps({k: v for k, v in row.items() if k != "tstamp"}) for row in rows)
        )
    return found or None
