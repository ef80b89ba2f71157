"""The command `intactkv`. Exit codes: 0; 2 for the user's fault, with one message and no traceback; 3 for a result
that is incomplete; 1 for ours.

Heavy imports wait for the command that needs them: `intactkv --help` and `intactkv report` load no torch.
"""

import sys
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval import __version__, judge_commands, pivot_commands, sweep_commands
from intactkv_eval.errors import ConfigError, IntactKVError, panics_named
from intactkv_eval.files import cache_folder, shipped_folder, write_atomic
from intactkv_eval.messages import clean_logs, say
from intactkv_eval.outputs import LEVELS, PIVOT, REPLACES, TABLES, check_output
from intactkv_eval.report.collect import collect
from intactkv_eval.report.incomplete import incomplete_sets
from intactkv_eval.report.page import page
from intactkv_eval.report.planned import absent_of, files_below
from intactkv_eval.report.tables import FORMATS

app = typer.Typer(
    name="intactkv",
    help="How much of what quantization takes does an intact pivot KV cache give back?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


class Bench(str, Enum):
    """What `intactkv bench` measures."""

    scoring = "scoring"
    decode = "decode"
    loading = "loading"
    talks = "talks"
    report = "report"


def _late(module: str, name: str) -> Any:
    """A function of ours whose module imports torch."""
    return getattr(import_module(f"intactkv_eval.{module}"), name)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        say(__version__)
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[Path | None, typer.Option(help="Where the model and the results are kept.")] = None,
) -> None:
    """Run the main job on a real small model, and print the table (about three minutes on two cores)."""
    say(_late("demo", "run_demo")(folder or cache_folder() / "demo", lambda text: say(text, err=True)))


@app.command(context_settings=_PASS_ON)
def eval(context: typer.Context) -> None:
    """Evaluate: lm_eval's own flags, with --model intactkv and our tasks/ filled in.

    For instance: intactkv eval --model_args pretrained=...,weights=rtn,bits=4,pivot=bos --tasks ppl_wikitext2
    """
    _late("harness.command", "run_lm_eval")(context.args)


@app.command()
def capture(
    model: Annotated[str, typer.Argument(help="The full-precision model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    pivot: Annotated[str, typer.Option(help="bos, prompt or tokens:ID+ID+...")] = "bos",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: that of the evaluation.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
    chat_template: Annotated[str | None, typer.Option(help="A template of model_configs/chat_templates.")] = None,
    chat_date: Annotated[str | None, typer.Option(help="The date that chat templates write: 2026-11-28.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    lightllm: Annotated[Path | None, typer.Option(help="Put the pivot into this checkpoint for LightLLM too.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks of LightLLM.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Save the pivot's full-precision KV: later runs take pivot=FILE.safetensors and no full-precision model."""
    arguments: dict[str, str | None] = {"pretrained": model, "dtype": dtype, "revision": revision, "pivot": pivot}
    arguments |= {"chat_template": chat_template, "chat_date": chat_date}
    loading = {"device": device, "trust_remote_code": trust_remote_code}
    check_output(out, PIVOT, [model, chat_template], overwrite)
    kept = _late("harness.command", "capture_to_file")(arguments, loading, out)
    if lightllm is not None:
        _late("pivot.lightllm", "write_lightllm")(kept, lightllm, ranks)
    say(f"{out}: {len(kept)} pivot token{'s' * (len(kept) > 1)} {list(kept.token_ids)} of {kept.fingerprint.model}")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="The full-precision model: a folder or a hub id.")],
    out: Annotated[Path, typer.Option(help="The new folder to write.")],
    method: Annotated[str | None, typer.Option(help="rtn (default), gptq, awq, omniquant or quarot.")] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Inputs that share a scale (128); -1 per channel.")] = None,
    symmetric: Annotated[bool | None, typer.Option("--symmetric/--asymmetric", help="Zero in the middle?")] = None,
    preset: Annotated[str | None, typer.Option(help="Settings of a published table, by name; options win.")] = None,
    data: Annotated[str | None, typer.Option(help="Calibration: wikitext2, c4, pile, or a .txt or .jsonl.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows (128).")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of each (2048).")] = None,
    seed: Annotated[int | None, typer.Option(help="Which windows are drawn (0).")] = None,
    pivot: Annotated[str | None, typer.Option(help="Calibrate behind this pivot's KV, as bos or tokens:1+2.")] = None,
    chat_date: Annotated[str | None, typer.Option(help="The date that chat templates write: 2026-11-28.")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="The method's own, KEY=VALUE.")] = None,
    rotate: Annotated[bool | None, typer.Option("--rotate/--no-rotate", help="QuaRot: rotate the model first.")] = None,
    act_bits: Annotated[int | None, typer.Option(help="Of activations: 8, 6 or 4.")] = None,
    act_scheme: Annotated[str | None, typer.Option(help="token (dynamic) or tensor (static, calibrated).")] = None,
    act_clip: Annotated[float | None, typer.Option(help="The share of the range that is kept.")] = None,
    act_symmetric: Annotated[
        bool | None, typer.Option("--act-symmetric/--act-asymmetric", help="Default: yes.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--format", help="gptq, awq, compressed-tensors, intactkv.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays in full precision: auto, float16, bfloat16.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    device: Annotated[str, typer.Option(help="Where a layer is worked on: cpu, cuda, cuda:0, ...")] = "cpu",
) -> None:
    """Quantize a model block by block and write a checkpoint: GPTQModel and transformers load it.

    A run that was killed goes on when the same command is given again. Of compressed-tensors transformers itself loads
    only symmetric ones (--symmetric), whoever wrote them.
    """
    given: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "data": data,
    }
    given |= {"samples": samples, "length": length, "seed": seed, "pivot": pivot, "rotate": rotate}
    given |= {"act_bits": act_bits, "act_scheme": act_scheme, "act_clip": act_clip}
    given["act_symmetric"] = act_symmetric
    job = _late("quantize.job", "job_from")(given, option or [], preset)
    command = import_module("intactkv_eval.harness.quantize_command")
    source = command.Source(model, dtype, revision, trust_remote_code, device, chat_date)
    count, written = command.quantize_to_folder(source, out, layout, job)
    say(f"{out}: {count} layers in {job.bits} bits by {job.method}, format {written}")


app.command()(pivot_commands.pivots)
app.command()(pivot_commands.figures)
app.command()(pivot_commands.calibrate)
app.command()(judge_commands.answers)
app.command()(judge_commands.judge)
app.command()(sweep_commands.sweep)


@app.command("kv-levels")
def kv_levels(
    model: Annotated[str, typer.Argument(help="The full-precision model: a folder or a hub id.")],
    data: Annotated[str, typer.Option(help="wikitext2, c4, pile, or a .txt or .jsonl.")],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="kv_bits of the cell.")] = 4,
    pivot: Annotated[str, typer.Option(help="Of the cell: none, bos, prompt or tokens:ID+ID+...")] = "bos",
    exempt: Annotated[bool, typer.Option(help="kv_exempt of the cell.")] = True,
    keep: Annotated[int, typer.Option(min=0, help="kv_keep of the cell.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Random pieces of the text.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a piece.")] = 512,
    seed: Annotated[int, typer.Option(help="Which pieces.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: that of the evaluation.")] = "auto",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit on the hub.")] = "main",
    chat_template: Annotated[str | None, typer.Option(help="A template of model_configs/chat_templates.")] = None,
    chat_date: Annotated[str | None, typer.Option(help="The date that chat templates write: 2026-11-28.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:0, ...")] = "cpu",
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model repository's own code.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Calibrate the levels that kv_scheme=pre_rope rounds to: cells take them with kv_levels=FILE.safetensors."""
    arguments: dict[str, str | None] = {"pretrained": model, "dtype": dtype, "revision": revision, "pivot": pivot}
    arguments |= {"chat_template": chat_template, "chat_date": chat_date}
    loading = {"device": device, "trust_remote_code": trust_remote_code}
    check_output(out, LEVELS, [model, data, chat_template], overwrite)
    made = _late("harness.kv_levels_command", "levels_of_text")(
        arguments, loading, bits, data, samples, length, seed, out, keep, exempt
    )
    done = made.calibration
    say(f"{out}: {bits} bits, {done.tokens} tokens of {done.origin}; first {done.left_out} rows left out")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders (or files) with lm_eval results JSON.")],
    out: Annotated[Path | None, typer.Option(help="Write it: .md, .csv, .tex, .json or .html; else print it.")] = None,
    leaves: Annotated[bool, typer.Option("--leaves", help="The tasks inside of groups, not the groups.")] = False,
    figures: Annotated[list[Path] | None, typer.Option(help=".html: pictures to show, or a folder of them.")] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Exit code 0 also where judged answers are not whole.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """The table of runs: values, deltas to baseline and full precision with their significance, share recovered."""
    ending = out.suffix[1:] if out is not None else "md"
    if ending not in {*FORMATS, "html"}:
        raise ConfigError(f"--out {out}: expected a name that ends in .{', .'.join([*FORMATS, 'html'])}")
    if figures and ending != "html":
        raise ConfigError("--figures: does nothing without --out NAME.html")
    if out is not None:
        read = [file for folder in folders for file in ([folder] if folder.is_file() else files_below(folder))]
        check_output(out, TABLES[ending], [*read, *(figures or ())], overwrite)
    elif overwrite:
        raise ConfigError("--overwrite: does nothing without --out")
    runs, foreign = collect(folders, leaves)
    if foreign:
        say(f"{foreign} results files of other model classes are left out", err=True)
    absent = absent_of(folders)
    table = page(runs, figures or (), absent) if ending == "html" else FORMATS[ending](runs, absent)
    if out is None:
        say(table)
    else:
        write_atomic(out, lambda partial: partial.write_text(table, encoding="utf-8"))
    scored = ((run.path, score.settings) for run in runs for score in run.scores.values())
    judge_commands.end_incomplete(incomplete_sets(scored), allow_partial)


@app.command()
def bench(
    what: Annotated[Bench, typer.Argument(help="What to measure.")] = Bench.scoring,
    model: Annotated[str | None, typer.Option(help="A folder or hub id; the demo's model if none.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="scoring: a task; may be repeated.")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="scoring: rows a batch; of several hf's fastest."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="scoring: float32 and bfloat16 if none.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="scoring: documents of each task. talks: questions (8).")
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of each (3); the median counts.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="talks: new tokens of an answer, at most (64).")] = None,
    files: Annotated[int | None, typer.Option(min=1, help="report: results files (10000).")] = None,
) -> None:
    """Measure against a rival in one run, lm_eval's own hf if none is named; a ratio is shown only if answers agree.

    scoring: log-likelihoods. decode: tokens a second on packed weights. loading: peak memory of a packed checkpoint.
    talks: MT-Bench's conversations, against transformers' generate question by question. report: reading and comparing
    many results files, made for it, against json.loads of them.
    """
    scores, talks = what is Bench.scoring, what is Bench.talks
    idle = {"--task": task and not scores, "--batch-size": batch_size and not scores, "--dtype": dtype and not scores,
            "--limit": limit and not (scores or talks), "--tokens": tokens and not talks,
            "--files": files and what is not Bench.report, "--model": model and what is Bench.report}  # fmt: skip
    for name, value in idle.items():
        if value:
            raise ConfigError(f"{name}: does nothing for bench {what.value}")
    if repeats is not None and what is Bench.loading:
        raise ConfigError("--repeats: does nothing for bench loading, whose peak is the same each time")
    if what is Bench.loading:
        if model is None:
            raise ConfigError("bench loading: name the packed checkpoint's folder with --model")
        say(_late("bench.loading", "loading")(Path(model)))
    elif what is Bench.report:
        say(_late("bench.report", "report")(files or 10_000, repeats or 1))
    elif what is Bench.decode:
        say(_late("bench.decode", "decode")(model, repeats or 3))
    elif talks:
        say(_late("bench.talks", "talks")(model, limit or 8, tokens or 64, repeats or 3))
    else:
        bench_scoring, demo_task = _late("bench.scoring", "scoring"), _late("bench.scoring", "DEMO_TASK")
        kinds = dtype or ["float32", "bfloat16"]
        say(bench_scoring(model, task or [demo_task], batch_size or [1, 8, 32], repeats or 3, kinds, limit))


@app.command()
def tasks() -> None:
    """Print the folder of our tasks, for lm_eval's --include_path."""
    say(shipped_folder("tasks"))


def main() -> None:
    """Entry point: the user's faults end in one message and exit code 2."""
    clean_logs()
    try:
        with panics_named("the model"):
            app()
    except IntactKVError as error:
        say(f"intactkv: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # not about a file that the user named
            raise
        say(f"intactkv: {error.filename}: {error.strerror}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
