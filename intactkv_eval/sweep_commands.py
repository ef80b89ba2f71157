"""The command about grids of cells. Heavy imports wait for it."""

from enum import Enum
from importlib import import_module
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
    out: Annotated[Path, typer.Option(help="The folder of results; what it holds is not done again.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and an estimate, run nothing.")] = False,
    model: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER: where a model of the grid lies.")] = None,
    model_args: Annotated[
        str, typer.Option("--model_args", "--model-args", help="KEY=VALUE,...: of every model, beside the grid's.")
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the code of the models' repositories, and of tasks that are files.")
    ] = False,
    executor: Annotated[Executor, typer.Option(help="local processes, or an existing Ray cluster.")] = Executor.local,
    devices: Annotated[
        str | None, typer.Option(help="local: cpu; cuda:0,cuda:1; cuda:0+1 for cells over two. Default: every GPU.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="ray: the cluster's (auto).")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="ray: cells at a time; default: as many as fit.")] = None,
    made: Annotated[
        Path | None, typer.Option(help="ray: a folder that all nodes see, for checkpoints that are made once.")
    ] = None,
) -> None:
    """Run a grid of cells: skips what is done, shares what can be, keeps the errors of those that fail.

    Killed at any time, the same command goes on. Exit code 1 where a cell failed; `intactkv report FOLDER` shows which.
    """
    if executor is Executor.local and (address is not None or workers is not None or made is not None):
        raise ConfigError("--address, --workers, --made: do nothing without --executor ray")
    if executor is Executor.ray and devices is not None:
        raise ConfigError(
            "--devices: does nothing with --executor ray; run.resources of the YAML says what a cell needs"
        )
    command = import_module("intactkv_eval.sweep.runner")
    given = command.given_arguments(model_args, trust_remote_code)
    grid = command.Sweep(file, out, dict(_pair(text) for text in model or []), given)
    if dry_run:
        say(grid.dry_run(workers or len(command.devices_here(devices))))
        return
    check_output(out / "sweep.json", PLAN, [file])
    ended = grid.run(command.Where(executor.value, devices, address or "auto", made, workers))
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
