"""Running one unit in this process: what it needs is made, then it is evaluated as by `intactkv eval`.

Knows nothing of other processes: executors (local.py, on_ray.py) call `SweepWorker.run` and see what comes.
"""

import gc
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.assemble.chat_date import moment_of_run
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.errors import CheckpointError, IntactKVError, panics_named
from intactkv_eval.lm.evaluate_task import evaluate_task
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.preparation import placed, prepare
from intactkv_eval.sweep.spec import RunSpec


class WorkerSlot(NamedTuple):
    """Where a unit is run: device in torch's words, the folder of what is made, and of this unit's response cache."""

    device: str
    made: Path
    responses: Path | None = None


class SweepWorker:
    """What a process keeps from one unit to the next: loaded models, and preparations that failed."""

    def __init__(self, run: RunSpec) -> None:
        self._run = run
        self._models = ModelCache()
        self._failed: dict[str, str] = {}

    def __enter__(self) -> "SweepWorker":
        return self

    def __exit__(self, *_: object) -> None:
        self._models.clear()

    def run(self, unit: Unit, place: WorkerSlot, out: Path) -> None:
        """Fill the empty folder `out` with the unit's results. Raises IntactKVError, or what lm_eval raises."""
        with moment_of_run(unit.begun, chosen=False), panics_named(f"pretrained={unit.arguments.get('pretrained')!r}"):
            self._run_now(unit, place, out)

    def _run_now(self, unit: Unit, place: WorkerSlot, out: Path) -> None:
        self._prepare(unit, place)
        seeded = {} if unit.seed is None else {"seed": unit.seed}
        arguments = placed(unit.arguments, place.made)
        metadata = {**seeded, **unit.task.metadata}
        models = self._models if self._run.share else None
        settings = _settings(unit, place, self._run)
        evaluate_task(arguments, unit.task.task, out, unit.seed, metadata, models, **settings)
        gc.collect()

    def _prepare(self, unit: Unit, place: WorkerSlot) -> None:
        for preparation in unit.preparations:
            name = preparation.name
            if name in self._failed:
                raise CheckpointError(
                    f"{name}, which an earlier cell needed too, could not be made: {self._failed[name]}"
                )
            if not (place.made / name).exists():
                self._models.clear()
                gc.collect()
            try:
                prepare(preparation, place.made, place.device)
            except IntactKVError as error:
                self._failed[name] = str(error)
                raise


def _settings(unit: Unit, place: WorkerSlot, run: RunSpec) -> dict[str, Any]:
    """Of lm_eval's `simple_evaluate`."""
    task = unit.task
    return {
        "device": place.device,
        "batch_size": run.batch_size,
        "max_batch_size": run.max_batch_size,
        "use_cache": None if place.responses is None else str(place.responses),
        "limit": task.limit,
        "num_fewshot": task.num_fewshot,
        "system_instruction": task.system_instruction,
        "gen_kwargs": task.gen_kwargs or None,
        "apply_chat_template": task.apply_chat_template,
        "fewshot_as_multiturn": task.apply_chat_template
        if task.fewshot_as_multiturn is None
        else task.fewshot_as_multiturn,
    }


def print_into(log: Path) -> None:
    """From now on whatever this process and its libraries print goes to `log`, a last traceback too."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def last_lines(log: Path, lines: int = 6) -> str:
    """How a log ends, without empty lines."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
