"""One task of lm_eval in this process, written as `lm_eval --output_path` writes it. Knows no command line."""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.compat.lm_eval_api import SEED_NAMES, EvaluationTracker, TaskManager, default_seeds, simple_evaluate
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm.plugin import NAME, missing
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.storage.limits import read_bytes


def task_manager(
    names: Sequence[str], metadata: Mapping[str, Any] | None = None, folders: Sequence[str] = ()
) -> TaskManager:
    """lm_eval's manager with our tasks; its own thousands of files are read only where not all `names` are ours.

    folders: searched instead of our own.
    """
    found = {"include_path": list(folders) or [str(shipped_folder("tasks"))], "metadata": dict(metadata or {})}
    ours = TaskManager(**found, include_defaults=False)
    return ours if set(names) <= set(ours.all_subtasks) else TaskManager(**found)


def check_known() -> None:
    """Raise ConfigError where lm_eval has not taken our model class into its registry, and say why."""
    reason = missing()
    if reason is not None:
        raise ConfigError(reason)


@contextmanager
def cache_explained() -> Iterator[None]:
    """Raise ConfigError where lm_eval's response cache cannot be read or written."""
    try:
        yield
    except sqlite3.Error as error:
        raise ConfigError(f"--use_cache: the response cache cannot be used ({error}); is the disk full?") from None


def results_below(folder: Path) -> dict[Path, int]:
    """The results files below a folder, or beside the file that is named, and when each was written."""
    is_file = folder.suffix == ".json"
    found = folder.parent.glob(f"{folder.stem}*.json") if is_file else folder.rglob("results_*.json")
    return {path: path.stat().st_mtime_ns for path in found} if folder.parent.is_dir() else {}


def check_written(folder: Path, before: Mapping[Path, int], samples: bool, stamps: Iterable[str] = ()) -> None:
    """Raise CheckpointError unless a whole results file came to `before`, and its samples where they were asked for.

    Where lm_eval cannot write, it goes on as if it had. stamps: how the names of this run's files end, where that is
    known: another process may be writing into the same folder.
    """
    new = [path for path, at in results_below(folder).items() if before.get(path) != at]
    own = set(stamps)
    new = [path for path in new if not own or path.stem.rpartition("_")[2] in own]
    for path in new:
        try:
            tasks = list(parse_json(read_bytes(path))["configs"]) if samples else ()
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: written in part ({error}); is the disk full? Run it again") from None
        stamp = path.stem.rpartition("_")[2]
        for file in (path.with_name(f"samples_{task}_{stamp}.jsonl") for task in tasks):
            if not file.is_file() or not _is_ended(file):
                raise CheckpointError(f"{file}: missing or written in part; is the disk full? Run it again")
    if not new:
        raise CheckpointError(f"{folder}: lm_eval could not write its results; is the disk full, or read-only?")


def _is_ended(file: Path) -> bool:
    """Whether its last line is whole."""
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 1))
        return lines.read(1) == b"\n"


def evaluate_task(
    model_args: Mapping[str, Any],
    task: str,
    out: Path,
    seed: int | None,
    metadata: Mapping[str, Any],
    models: ModelCache | None = None,
    **settings: Any,
) -> None:
    """Evaluate the model class on `task`, and write results and samples below `out`.

    seed: for all that lm_eval seeds; its defaults where None. models: keeps models for the next call. settings: of
    lm_eval's `simple_evaluate`. Raises IntactKVError, or what lm_eval raises.
    """
    check_known()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    told = {**model_args, **metadata}
    seeds = default_seeds() if seed is None else dict.fromkeys(SEED_NAMES, seed)
    tracker = EvaluationTracker(output_path=str(out))
    flags = {key: settings.get(key) for key in ("batch_size", "max_batch_size", "device")}
    with cache_explained():
        results = simple_evaluate(
            model=IntactKVLM.create_from_arg_obj(dict(model_args), flags, models),
            model_args=dict(model_args),
            tasks=[task],
            task_manager=task_manager([task], told),
            metadata=told,
            evaluation_tracker=tracker,
            log_samples=True,
            **seeds,
            **settings,
        )
    results["config"]["model"] = tracker.general_config_tracker.model_source = NAME
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    check_written(out, {}, samples=True)


def check_tasks(names: Sequence[str], folders: Sequence[str] = ()) -> None:
    """Raise ConfigError unless lm_eval knows every task; `folders` are searched after ours."""
    if not names:
        raise ConfigError("--tasks: no task named; for instance --tasks ppl_wikitext2,arc_easy (lm_eval ls tasks)")
    manager = task_manager(names, folders=folders)
    known = set(manager.all_tasks)
    unknown = [
        name
        for name in names
        # the newest lm_eval gives back what it does not know, and takes `task@format`
        if not os.path.exists(name) and not known & {one.partition("@")[0] for one in manager.match_tasks([name])}
    ]
    if unknown:
        raise ConfigError(f"--tasks: unknown: {', '.join(unknown)}; lm_eval ls tasks --include_path $(intactkv tasks)")
