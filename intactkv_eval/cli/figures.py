"""`intactkv figures`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import check_figures, inputs_of
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


def figures(
    model_args: shared.ModelArgs,
    out: Annotated[Path, typer.Option(help="The folder to write: plots, and their numbers.")],
    data: shared.Data = "wikitext2",
    samples: Annotated[int, typer.Option(min=1, help="The number of pieces of text behind the pivot.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="The number of tokens of a piece.")] = 256,
    seed: shared.Seed = 0,
    layers: Annotated[
        str, typer.Option(help="The layers of the attention maps, for instance 0,9,20; four of them if none is given.")
    ] = "",
    head: Annotated[
        int | None, typer.Option(min=0, help="The head of the attention maps; the mean of all if none is given.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="The layer of outputs and cache; the most uneven and the middle one if none is given."),
    ] = None,
    formats: Annotated[str, typer.Option(help="The formats of the plots: png, pdf, svg.")] = "png",
    device: shared.Device = "cpu",
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Plot a cell: outliers, attention, loss and perplexity by the size of the intact pivot, the KV cache."""
    arguments, loading = shared.cell_and_loading(model_args, device, trust_remote_code)
    kinds = tuple(part.strip() for part in formats.split(",") if part.strip())
    listed = [part.strip() for part in layers.split(",") if part.strip()]
    if not all(part.isdigit() for part in listed):
        raise ConfigError(f"--layers {layers}: write numbers, for instance 0,9,20")
    from intactkv_eval.report.plots import FIGURES, check_drawing, draw

    check_drawing(kinds)
    names = [f"{name}.{kind}" for name in FIGURES for kind in kinds]
    check_figures(out, names, [*inputs_of(arguments, loading), data], overwrite)
    from intactkv_eval.commands.figures import FigureOptions, numbers_to_folder

    options = FigureOptions(data, samples, length, seed, tuple(map(int, listed)), head, layer)
    numbers_to_folder(arguments, loading, options, out)
    for path in draw(out, kinds):
        say(path)
