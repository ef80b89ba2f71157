"""What `intactkv sweep` does: a YAML in; every cell's results, or why it has none, in one folder out."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from intactkv_eval.assemble.chat_date import moment_of_run
from intactkv_eval.cell.arguments import CELL_KEYS, cell_from_args
from intactkv_eval.cell.formulas import current, names_of_cell, names_of_job
from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.cell.trust import TRUST
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.evaluate_task import check_tasks
from intactkv_eval.lm.hf_arguments import check_names, split_model_args
from intactkv_eval.report.collect import read_run
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.storage.limits import read_bytes
from intactkv_eval.sweep.estimate import estimate
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import Unit, check_entries, expand
from intactkv_eval.sweep.local import LocalPool, check_slots
from intactkv_eval.sweep.on_ray import RayPool
from intactkv_eval.sweep.pool import Pool
from intactkv_eval.sweep.preparation import QuantizePreparation, placed
from intactkv_eval.sweep.progress import Progress
from intactkv_eval.sweep.schedule import UnitFinished, run_units
from intactkv_eval.sweep.spec import GridSpec, RunSpec, SweepSpec, read_sweep


class RunLocation(NamedTuple):
    """executor: local or ray. devices: of local slots. address, made, workers: of Ray (on_ray.py)."""

    executor: str = "local"
    devices: str | None = None
    address: str = "auto"
    made: Path | None = None
    workers: int | None = None


class Sweep:
    """A checked sweep: its units, and the folder of its results.

    file: a YAML, or the name of a shipped one. models: a name of the YAML -> where that model lies here.
    given: model arguments of the command line, which every model of the sweep gets: what runs code is taken from there
    alone. Raises ConfigError for whatever is wrong with the YAML.
    """

    def __init__(
        self, file: Path, out: Path, models: Mapping[str, str], given: Mapping[str, Any] | None = None
    ) -> None:
        shipped = shipped_folder("sweeps") / f"{file}.yaml"
        file = shipped if not file.suffix and not file.exists() and shipped.is_file() else file
        try:
            text = read_bytes(file).decode("utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from None
        spec = read_sweep(text, str(file))
        check_entries(spec)
        self.spec = _with(_at(spec, models), given or {})
        self.units = expand(self.spec)
        tasks = sorted({unit.task.task for unit in self.units})
        check_files_of_tasks(file, tasks, bool((given or {}).get(TRUST)))
        check_tasks(tasks)
        self.folder = SweepFolder(out)

    @property
    def waiting(self) -> list[Unit]:
        """Units without a result; those that failed are tried again."""
        return [unit for unit in self.units if not self.folder.is_done(unit.key)]

    def dry_run(self, slots: int) -> str:
        """Every cell and whether it is done, then an estimate."""
        lines = [
            f"{'done' if self.folder.is_done(unit.key) else '    '} {unit.key} {unit.label}" for unit in self.units
        ]
        return "\n".join([*lines, "", *estimate(self.waiting, self.units, self.folder, slots)])

    def run(self, where: RunLocation) -> list[UnitFinished]:
        """Run what waits; how each unit of it ended. Raises ConfigError where nothing can be run."""
        if where.executor == "local":
            check_slots(devices_here(where.devices))
        with self.folder.alone():
            self.folder.plan([_planned(unit, self.folder) for unit in self.units])
            with moment_of_run() as now:
                begun = self.folder.begun(now)
            waiting = [replace(unit, begun=begun) for unit in self.waiting]
            if not waiting:
                return []
            run = self.spec.run
            with (
                _pool(where, self.folder, run, len(waiting)) as pool,
                Progress(pool.names, len(waiting), self._figure) as shown,
            ):
                return run_units(waiting, pool, self.folder, run.retries, shown.happened, shown.look)

    def _figure(self, key: str) -> str:
        """The figures of a unit that is done."""
        files = sorted(self.folder.cell(key).rglob("results_*.json"))
        run = read_run(files[0]) if files else None
        found = run.scores.values() if run is not None else ()
        return ", ".join(f"{score.metric} {score.value:.4g}" for score in found) or "done"


def given_arguments(text: str, trusted: bool) -> dict[str, Any]:
    """Model arguments of the command line, for every model of a sweep. Raises ConfigError: unknown, or given twice."""
    cell, loading = split_model_args(text)
    check_names(cell, loading)
    if "pretrained" in cell:
        raise ConfigError("--model_args: pretrained: the sweep names its models; --model NAME=FOLDER moves one")
    if trusted and TRUST in loading:
        raise ConfigError(f"{TRUST}: give it once, as --trust-remote-code")
    return {**cell, **loading, **({TRUST: True} if trusted else {})}


def devices_here(asked: str | None) -> list[str]:
    """The slots of this machine: as asked, else every GPU, else the CPU."""
    if asked:
        return [part.strip() for part in asked.split(",") if part.strip()]
    return [f"cuda:{place}" for place in range(torch.cuda.device_count())] or ["cpu"]


@contextmanager
def _pool(where: RunLocation, folder: SweepFolder, run: RunSpec, waiting: int) -> Iterator[Pool]:
    pool: LocalPool | RayPool
    if where.executor == "ray":
        pool = RayPool(where.address, folder, run, where.made, min(where.workers or waiting, waiting))
    else:
        pool = LocalPool(devices_here(where.devices)[:waiting], folder, run)
    with closing(pool):
        yield pool


def _at(sweep: SweepSpec, models: Mapping[str, str]) -> SweepSpec:
    named = {str(entry.get("pretrained")) for grid in sweep.grids for entry in grid.models}
    for name in models:
        if name not in named:
            raise ConfigError(f"--model {name}=...: the sweep has no such model, but {', '.join(sorted(named))}")
    return sweep.model_copy(update={"grids": tuple(_moved(grid, models) for grid in sweep.grids)})


def _with(sweep: SweepSpec, given: Mapping[str, Any]) -> SweepSpec:
    """Every model of the sweep with the arguments of the command line, those of no cell among them."""
    grids = (
        grid.model_copy(update={"models": tuple({**entry, **given} for entry in grid.models)}) for grid in sweep.grids
    )
    made = sweep.model_copy(update={"grids": tuple(grids)}) if given else sweep
    check_entries(made)
    return made


def check_files_of_tasks(file: Path, tasks: Sequence[str], trusted: bool) -> None:
    """Raise ConfigError for a task that the sweep names by its file, whose YAML may name Python functions."""
    named = next((task for task in tasks if Path(task).expanduser().is_file()), None)
    if named is not None and not trusted:
        raise ConfigError(
            f"{file}: task {named} is a file, and a task's file may run Python code. A sweep may be a stranger's: if "
            "you trust this file, give --trust-remote-code"
        )


def _moved(grid: GridSpec, models: Mapping[str, str]) -> GridSpec:
    moved = tuple({**entry, "pretrained": models.get(str(entry.get("pretrained")), entry.get("pretrained"))}
                  if "pretrained" in entry else entry for entry in grid.models)  # fmt: skip
    return grid.model_copy(update={"models": moved})


def _planned(unit: Unit, folder: SweepFolder) -> dict[str, Any]:
    """The unit as the report knows a run: enough to name its row where it has no result."""
    arguments = placed(unit.arguments, folder.made)
    cell = cell_from_args({key: value for key, value in arguments.items() if key in CELL_KEYS})
    quantize = unit.quantize
    return {
        "format": RECORD_FORMAT,
        "key": unit.key,
        "task": unit.task.task,
        "seed": unit.seed,
        "cell": cell.model_dump(mode="json"),
        "formulas": current(names_of_cell(cell)),
        "symmetric_formula": cell.weights.symmetric_formula,
        "hf_arguments": {key: str(value) for key, value in arguments.items() if key not in CELL_KEYS},
        "quantization": None if quantize is None else _quantization(quantize),
    }


def _quantization(quantize: QuantizePreparation) -> dict[str, Any]:
    job = quantize.job()
    ordered = bool(job.options.get("act_order")) and not job.options.get("static_groups") and job.group_size != -1
    return {
        "method": job.method,
        "bits": job.bits,
        "group_size": job.group_size,
        "symmetric": job.symmetric,
        "act_order": ordered,
        "mixed": False,
        "activations": job.activations.model_dump(mode="json"),
        "rotation": {} if not job.rotate else {"rotated": True},
        "made": {
            "job": job.model_dump(mode="json"),
            "source": {"model": str(quantize.model["pretrained"])},
            "formulas": current(names_of_job(job.model_dump(mode="json"))),
        },
    }
