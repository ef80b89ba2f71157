"""`intactkv sweep`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.commands.outputs import PLAN, check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


class Executor(str, Enum):
    """Where cells are run."""

    local = "local"
    ray = "ray"


def sweep(
    file: Annotated[
        Path, typer.Argument(help="The grid: a YAML, or the name of one of ours: table1 to 5, kv, quantizers, smollm2.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of results; cells that have their results are not run again.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and an estimate, run nothing.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="The folder of a model that the grid names: NAME=FOLDER.")
    ] = None,
    model_args: Annotated[
        str, typer.Option("--model_args", "--model-args", help="KEY=VALUE,... for every model, beside the grid's.")
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the code of the models' repositories, and of tasks that are files.")
    ] = False,
    executor: Annotated[
        Executor, typer.Option(help="Run cells in local processes, or on an existing Ray cluster.")
    ] = Executor.local,
    devices: Annotated[
        str | None,
        typer.Option(help="Local devices: cpu; cuda:0,cuda:1; cuda:0+1 for cells over two. The default is every GPU."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="The address of the Ray cluster (auto).")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="The number of cells at a time on Ray; as many as fit if none is given.")
    ] = None,
    shared_folder: Annotated[
        Path | None, typer.Option(help="A folder that all Ray nodes see, for checkpoints that are made once.")
    ] = None,
) -> None:
    """Run a grid of cells: skips finished cells, shares models, and keeps the errors of cells that fail.

    Killed at any time, the same command continues. Exit code 1 where a cell failed; `intactkv report
    FOLDER` shows which.
    """
    if executor is Executor.local and (address is not None or workers is not None or shared_folder is not None):
        raise ConfigError("--address, --workers, --shared-folder: do nothing without --executor ray")
    if executor is Executor.ray and devices is not None:
        raise ConfigError(
            "--devices: does nothing with --executor ray; run.resources of the YAML says what a cell needs"
        )
    from intactkv_eval.sweep.runner import RunLocation, Sweep, devices_here, given_arguments

    given = given_arguments(model_args, trust_remote_code)
    grid = Sweep(file, out, dict(_pair(text) for text in model or []), given)
    if dry_run:
        say(grid.dry_run(workers or len(devices_here(devices))))
        return
    check_output(out / "sweep.json", PLAN, [file])
    ended = grid.run(RunLocation(executor.value, devices, address or "auto", shared_folder, workers))
    failed = [end for end in ended if end.error is not None]
    done = len(grid.units) - len(grid.waiting)
    say(f"{done} of {len(grid.units)} cells done, {len(failed)} failed; intactkv report {out}")
    if failed:
        raise typer.Exit(1)


def _pair(text: str) -> tuple[str, str]:
    name, sign, folder = text.partition("=")
    if not (name and sign and folder):
        raise ConfigError(f"--model {text}: write NAME=FOLDER")
    return name, folder
