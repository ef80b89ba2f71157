"""On real benchmark data, where it lies beside the checkout: figures equal those of lm_eval's own `hf`."""

import json
import subprocess
import sys
from math import exp
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.shared, pytest.mark.slow]
TASKS = ("arc_easy", "hellaswag", "winogrande", "openbookqa")
LIMIT = "25"


def evaluate(model, arguments, hub, out):
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", model, "--model_args", arguments, "--tasks", ",".join(TASKS),
               "--limit", LIMIT, "--batch_size", "8", "--output_path", str(out), "--log_samples"]  # fmt: skip
    done = subprocess.run(command, cwd=hub, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.rglob("results_*.json")
    figures = json.loads(file.read_text())["results"]
    answers = {}
    for task in TASKS:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        answers[task] = [
            float(answer[0][0]) for row in sorted(rows, key=lambda r: r["doc_id"]) for answer in row["resps"]
        ]
    return {task: {k: v for k, v in figures[task].items() if k.startswith("acc")} for task in TASKS}, answers


def test_full_precision_is_hf(smollm2, shared_hub, tmp_path):
    hf, hf_answers = evaluate(
        "hf", f"pretrained={smollm2},dtype=float32,add_bos_token=True", shared_hub, tmp_path / "hf"
    )
    for pivot in ("none", "bos"):
        arguments = f"pretrained={smollm2},dtype=float32,weights=none,pivot={pivot}"
        ours, answers = evaluate("intactkv", arguments, shared_hub, tmp_path / pivot)
        assert ours == hf
        for task in TASKS:
            assert answers[task] == pytest.approx(hf_answers[task], abs=5e-4), task


def test_wikitext2_is_thirty_lines_of_transformers(smollm2, shared_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("INTACTKV_DATA", str(shared_hub))
    command = [str(Path(sys.executable).parent / "intactkv"), "eval", "--model_args", f"pretrained={smollm2},dtype=float32,pivot=bos",
               "--tasks", "ppl_wikitext2", "--limit", "3", "--output_path", str(tmp_path)]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["ppl_wikitext2"]["perplexity,none"]

    import datasets

    rows = datasets.load_dataset(str(shared_hub / "Salesforce/wikitext"), "wikitext-2-raw-v1", split="test")["text"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.tensor(tokenizer("\n\n".join(rows)).input_ids)
    means = []
    for i in range(3):
        window = ids[i * 2048 : (i + 1) * 2048].clone()
        window[0] = tokenizer.bos_token_id
        with torch.no_grad():
            log_probs = model(window[None]).logits[0, 1:-1].log_softmax(-1)
        means.append(-log_probs.gather(1, window[2:, None]).mean().item())
    assert found == pytest.approx(exp(sum(means) / 3), rel=1e-4)
