"""The real SmolLM2-135M-Instruct: the main job, and the claims that only a real model can show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from intactkv_eval.cell.spec import ActivationSpec, WeightSpec
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.demo import run_demo
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.input_transforms import apply_input_transforms
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.quantize.rotation import rotate

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent


def requests(kind, arguments):
    return [make_request(kind, args, i, task="task") for i, args in enumerate(arguments)]


def test_demo_prints_the_table(tmp_path, smollm2):
    (tmp_path / smollm2.name).symlink_to(smollm2)
    said = []
    table = run_demo(tmp_path, said.append)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| SmolLM2")]
    assert [row[1:4:2] for row in rows] == [
        ["fp", "none"],
        *([f"rtn w{b}g64", p] for b in (4, 3) for p in ("none", "bos")),
    ]
    assert "Q4_1" in table
    values = [float(row[4].split()[0]) for row in rows]
    assert values[0] < values[2] < values[1] < values[4] < values[3], "the pivot helps, and never beats full precision"
    assert len(said) == 5
    assert len(list((tmp_path / "results").glob("results_*.json"))) == 5


def test_the_chat_head_is_24_tokens_and_invisible_in_full_precision(smollm2):
    """pivot=prompt: answers to chat prompts are those of plain `hf`."""
    lm = IntactKVLM(str(smollm2), dtype="float32", device="cpu", pivot="prompt", batch_size=3)
    assert len(lm.pivoted_model.token_ids) == 24
    hf = HFLM(str(smollm2), dtype="float32", device="cpu")
    chats = [
        lm.apply_chat_template([{"role": "user", "content": text}]) for text in ("Hi!", "Name a large river.", "2+2?")
    ]
    arguments = [(chat, {"until": [], "max_gen_toks": 12}) for chat in chats]
    assert lm.generate_until(requests("generate_until", arguments), True) == hf.generate_until(
        requests("generate_until", arguments), True
    )
    assert lm.framing.counts["stripped"] == 3
    pairs = [(chat, "Yes, of course.") for chat in chats]
    ours, theirs = (m.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for m in (lm, hf))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=5e-4)


def test_quantized_weights_take_the_memory_that_their_bits_say(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    made = quantize_model(model, WeightSpec(method="rtn", bits=4, group_size=64))
    layer = made.model.layers[0].mlp.up_proj
    stored = sum(t.numel() * t.element_size() for t in layer.kernel.tensors().values())
    assert stored == 1536 * (576 * 4 // 8 + (576 // 64) * (4 + 1))
    assert torch.isfinite(made(torch.arange(5)[None]).logits).all()


def test_the_literal_command_with_bos_and_batches(smollm2, tmp_path):
    """lm_eval itself, batch sizes 1, 7 and auto: the same log-likelihoods."""
    found = {}
    for size in ("1", "7", "auto"):
        out = tmp_path / size
        arguments = f"pretrained={smollm2},dtype=float32,weights=rtn,bits=3,group_size=64,pivot=bos"
        command = [str(BIN / "lm_eval"), "--model", "intactkv", "--model_args", arguments, "--tasks", "intactkv_demo_qa",
                   "--include_path", "tasks", "--limit", "12", "--batch_size", size, "--output_path", str(out), "--log_samples"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[1])
        (samples,) = out.rglob("samples_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        found[size] = [float(answer[0][0]) for row in rows for answer in row["resps"]]
    assert found["1"] == pytest.approx(found["7"], abs=5e-4)
    assert found["1"] == pytest.approx(found["auto"], abs=5e-4)
    assert len(found["1"]) == 48


def test_two_processes_share_the_work(smollm2, tmp_path):
    """Two ranks on CPU (accelerate launch starts such processes on GPUs): each takes half of the documents, and the result is that of one process."""
    results = {}
    arguments = f"pretrained={smollm2},dtype=float32,pivot=bos"
    rest = ["-m", "lm_eval", "--model", "intactkv", "--model_args", arguments, "--tasks", "intactkv_demo_qa",
            "--include_path", "tasks", "--limit", "10", "--batch_size", "4"]  # fmt: skip
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for name, front in (("one", []), ("two", launch)):
        out = tmp_path / name
        done = subprocess.run([sys.executable, *front, *rest, "--output_path", str(out), "--log_samples"],
                              check=False, capture_output=True, text=True, env=env, cwd=Path(__file__).parents[1])  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (file,) = out.rglob("results_*.json")
        content = json.loads(file.read_text())
        (samples,) = out.rglob("samples_*.jsonl")
        ids = sorted(json.loads(line)["doc_id"] for line in samples.read_text().splitlines())
        results[name] = (
            content["results"]["intactkv_demo_qa"]["acc,none"],
            ids,
            content["config"]["intactkv"]["world_size"],
        )
    assert results["one"][:2] == results["two"][:2]
    assert (results["one"][2], results["two"][2]) == (1, 2)


@pytest.mark.parametrize("intact", [False, True])
def test_a_rotation_with_every_quantizer_off_is_the_plain_model(smollm2, intact):
    """Rotated weights, online Hadamard transforms and a pivot turned into their basis: logits within 1e-4, fp32."""
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    front = (1, 9690, 198)
    text = torch.randint(3, 40_000, (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(torch.cat([torch.tensor([front] * 2), text], dim=1)).logits[:, len(front) :]
        pivot = capture(model, front, fingerprint_of(model, "main")) if intact else None
        apply_input_transforms(model, rotate(model), ActivationSpec())
        found = PivotedModel(model, front, pivot and to_rotated(pivot)).body_logits(text)
        assert (found - wanted).norm() / wanted.norm() < 1e-4
        if pivot is not None:
            astray = PivotedModel(model, front, pivot).body_logits(text)
            assert (astray - wanted).norm() / wanted.norm() > 1e-2, "a pivot in the wrong basis is seen"
