"""The commands about the pivot itself: finding it, training it. Heavy imports wait for the command that needs them."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval.commands.outputs import (
    CONVERSATIONS,
    LOG,
    PIVOT,
    PREFIX,
    REPLACES,
    check_figures,
    check_output,
    inputs_of,
)
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


def pivots(
    model: Annotated[str, typer.Argument(help="The full-precision model: a folder or a hub id.")],
    text: Annotated[str, typer.Option(help="wikitext2, c4, pile, or a .txt or .jsonl.")] = "wikitext2",
    samples: Annotated[int, typer.Option(help="Pieces of it; every other one judges what the rest chose.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a piece.")] = 256,
    seed: Annotated[int, typer.Option(help="Which pieces.")] = 0,
    threshold: Annotated[float, typer.Option(help="How many times the median of its layer a pivot reaches.")] = 8.0,
    most: Annotated[int, typer.Option(help="Tokens of the prefix, BOS among them.")] = 4,
    least: Annotated[float, typer.Option(help="The share of pivots that each token of it must remove.")] = 0.2,
    attention: Annotated[bool, typer.Option("--attention/--no-attention", help="Measure attention too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the prefix and its evidence: pivot=FILE.json.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Find the pivot tokens of a model, and propose a prefix that keeps later tokens from becoming pivots."""
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: a prefix with its evidence ends in .json")
    if out is not None:
        check_output(out, PREFIX, [model, text], overwrite)
    elif overwrite:
        raise ConfigError("--overwrite: does nothing without --out")
    search = import_module("intactkv_eval.pivot.auto").Search(text, samples, length, seed, threshold, most, least)
    arguments = {"pretrained": model, "dtype": dtype, "revision": revision}
    loading = {"device": device, "trust_remote_code": trust_remote_code}
    command = import_module("intactkv_eval.commands.find_pivots")
    say(command.pivots_of(arguments, loading, search, attention, out))


def figures(
    model_args: Annotated[str, typer.Option("--model_args", "--model-args", help="The cell, as for `intactkv eval`.")],
    out: Annotated[Path, typer.Option(help="The folder to write: figures, and their numbers.")],
    text: Annotated[str, typer.Option(help="wikitext2, c4, pile, or a .txt or .jsonl.")] = "wikitext2",
    samples: Annotated[int, typer.Option(min=1, help="Pieces of it behind the pivot.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a piece.")] = 256,
    seed: Annotated[int, typer.Option(help="Which pieces.")] = 0,
    layers: Annotated[str, typer.Option(help="Of the attention maps: 0,9,20; four of them if none.")] = "",
    head: Annotated[int | None, typer.Option(min=0, help="Of the attention maps; the mean of all if none.")] = None,
    layer: Annotated[int | None, typer.Option(help="Of outputs and cache; the most uneven, the middle one.")] = None,
    formats: Annotated[str, typer.Option(help="Of png, pdf and svg.")] = "png",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Draw a cell: outliers, attention, loss and perplexity by the size of the intact pivot, the KV cache."""
    arguments, loading = _cell_and_loading(model_args, device, trust_remote_code)
    kinds = tuple(part.strip() for part in formats.split(",") if part.strip())
    listed = [part.strip() for part in layers.split(",") if part.strip()]
    if not all(part.isdigit() for part in listed):
        raise ConfigError(f"--layers {layers}: write numbers, for instance 0,9,20")
    drawing = import_module("intactkv_eval.report.figures")
    drawing.check_drawing(kinds)
    names = [f"{name}.{kind}" for name in drawing.FIGURES for kind in kinds]
    check_figures(out, names, [*inputs_of(arguments, loading), text], overwrite)
    command = import_module("intactkv_eval.commands.figures")
    shown = command.Shown(text, samples, length, seed, tuple(map(int, listed)), head, layer)
    command.numbers_to_folder(arguments, loading, shown, out)
    for path in drawing.draw(out, kinds):
        say(path)


def calibrate(
    model_args: Annotated[str, typer.Option("--model_args", "--model-args", help="The cell, as for `intactkv eval`.")],
    data: Annotated[str, typer.Option(help="Conversations: .json (ShareGPT), .jsonl, .txt, or a data set ORG/NAME.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; a .csv log is put beside it.")],
    answer: Annotated[int, typer.Option(min=0, help="Let the full model answer questions, in so many tokens.")] = 0,
    conversations: Annotated[int | None, typer.Option(min=2, help="So many, drawn by --seed; all if none.")] = None,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate, constant.")] = 2e-4,
    batch: Annotated[int, typer.Option(help="Conversations a step.")] = 16,
    epochs: Annotated[int, typer.Option(help="At most.")] = 20,
    clip: Annotated[float, typer.Option(help="Greatest norm of a step's gradient; 0 for none.")] = 0.3,
    held_out: Annotated[float, typer.Option(help="Share of the conversations that is never trained on.")] = 0.2,
    patience: Annotated[int, typer.Option(help="Epochs without a better held-out loss before it ends.")] = 3,
    seed: Annotated[int, typer.Option(help="Which are drawn and held out, and their order.")] = 0,
    tokens: Annotated[int, typer.Option(min=2, help="Of a conversation, at most; more are cut off.")] = 1024,
    assistant: Annotated[int, typer.Option(min=0, help="Leave out those without more assistant tokens.")] = 50,
    budget: Annotated[float, typer.Option(min=0, help="GB on disk for full-precision outputs; more: recomputed.")] = 32,
    recompute: Annotated[
        bool, typer.Option("--recompute/--no-recompute", help="One layer's activations in memory; or all, faster.")
    ] = True,
    master: Annotated[str, typer.Option(help="Of the trained copy: float32 or bfloat16.")] = "float32",
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard too, in OUT.tensorboard.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Train the pivot's KV for one quantized model: later runs take pivot=FILE.safetensors.

    The defaults are the paper's, which takes 128 conversations. A run that was killed goes on when the same command
    is given again. On several GPUs:
    accelerate launch -m intactkv_eval.cli calibrate ...
    """
    command = import_module("intactkv_eval.commands.calibrate")
    arguments, loading = _cell_and_loading(model_args, device, trust_remote_code)
    inputs = [*inputs_of(arguments, loading), data]
    check_output(out, PIVOT, inputs, overwrite)
    check_output(out.with_suffix(".csv"), LOG, inputs, overwrite)
    if answer:
        check_output(out.with_suffix(".answers.jsonl"), CONVERSATIONS, inputs, overwrite)
    asked = command.Asked(
        data, answer, tokens, assistant, int(budget * 1e9), recompute, master, tensorboard, conversations
    )
    settings: Any = command.Settings(rate, batch, epochs, clip, held_out, patience, seed)
    found = command.calibrate_to_file(arguments, loading, asked, settings, out)
    if not found.first:
        return
    rows = zip(("all layers", "last layer", "nats a token"), found.before, found.after, strict=True)
    say(f"held out     {'before':>9} {'after':>9}   ({found.examples} conversations, best epoch {found.best_epoch})")
    for name, before, after in rows:
        full = f"   (full precision {found.full_nats:.4g})" if name == "nats a token" else ""
        say(f"{name:12} {before:9.4g} {after:9.4g}{full}")
    if not found.best_epoch:
        say("no epoch was better on held-out conversations: the file holds the rows as they were", err=True)
    say(f"{out}: for {found.pivot.fingerprint.calibrated.cell}; log in {found.log}")  # type: ignore[union-attr]


def _cell_and_loading(model_args: str, device: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keys of the cell, and the arguments of lm_eval's `hf`. Raises ConfigError: unknown, or given twice."""
    keys = import_module("intactkv_eval.lm.hf_arguments")
    arguments, loading = keys.split_model_args(model_args)
    keys.check_names(arguments, loading)
    for name, value in (("device", device), ("trust_remote_code", trust_remote_code)):
        if name in loading:
            raise ConfigError(f"{name}: give it once, as --{name.replace('_', '-')}")
        loading[name] = value
    return arguments, loading
