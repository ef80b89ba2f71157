"""One task of lm_eval in this process, written as `lm_eval --output_path` writes it. Knows no command line."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.config.evaluate_config import DEFAULT_SEED
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from intactkv_eval.files import shipped_folder
from intactkv_eval.harness.plugin import NAME


def task_manager(
    names: Sequence[str], metadata: Mapping[str, Any] | None = None, folders: Sequence[str] = ()
) -> TaskManager:
    """lm_eval's manager with our tasks; its own thousands of files are read only where not all `names` are ours.

    folders: searched instead of our own.
    """
    found = {"include_path": list(folders) or [str(shipped_folder("tasks"))], "metadata": dict(metadata or {})}
    ours = TaskManager(**found, include_defaults=False)
    return ours if set(names) <= set(ours.all_subtasks) else TaskManager(**found)


def evaluate_task(
    model_args: Mapping[str, Any], task: str, out: Path, seed: int | None, metadata: Mapping[str, Any], **settings: Any
) -> None:
    """Evaluate the model class on `task`, and write results and samples below `out`.

    seed: for all that lm_eval seeds; its defaults where None. settings: of lm_eval's `simple_evaluate`.
    Raises IntactKVError, or what lm_eval raises.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    told = {**model_args, **metadata}
    seeds = DEFAULT_SEED if seed is None else [seed] * len(DEFAULT_SEED)
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    tracker = EvaluationTracker(output_path=str(out))
    results = simple_evaluate(
        model=NAME,
        model_args=dict(model_args),
        tasks=[task],
        task_manager=task_manager([task], told),
        metadata=told,
        evaluation_tracker=tracker,
        log_samples=True,
        **dict(zip(names, seeds, strict=True)),
        **settings,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
