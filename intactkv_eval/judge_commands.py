"""The commands `intactkv judge` and `intactkv answers`."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval.commands.outputs import ANSWERS, REPLACES, REPLIES, check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say

Sources = Annotated[list[Path], typer.Argument(help="Runs of lm_eval with --log_samples, or FastChat answer files.")]
BenchName = Annotated[str, typer.Option(help="Whose questions: mt_bench or vicuna_bench.")]


def answers(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="The folder: one NAME.jsonl for each run.")],
    bench: BenchName = "mt_bench",
    overwrite: Annotated[bool, typer.Option("--overwrite", help=REPLACES)] = False,
) -> None:
    """Write the answers of runs as FastChat's model_answer files."""
    entries = import_module("intactkv_eval.judge.entries")
    for entry in entries.load_entries(sources, bench):
        check_output(out / f"{entry.name}.jsonl", ANSWERS, sources, overwrite)
    for path in entries.export_answers(sources, out, bench):
        say(path)


def judge(
    sources: Sources,
    model: Annotated[str, typer.Option(help="The judge, as its server names it: gpt-4, ...")],
    out: Annotated[Path, typer.Option(help="The folder of replies, judgments and results; a re-run goes on in it.")],
    base_url: Annotated[
        str | None, typer.Option(help="Another server, OpenAI-compatible or Anthropic's: http://host:port/v1")
    ] = None,
    bench: BenchName = "mt_bench",
    questions: Annotated[Path | None, typer.Option(help="Local data in FastChat's layout.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Judge pairs against these answers, in both orders.")] = None,
    pairwise_all: Annotated[bool, typer.Option("--pairwise-all", help="Judge pairs of every two models.")] = False,
    references: Annotated[
        str | None, typer.Option(help="Whose reference answers, for math, reasoning, coding; the judge's own if none.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Most requests a minute.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that the server or the network fails.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="Of a request whose reply holds no verdict.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Until a request is given up.")] = 120.0,
    most_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 2048,
    price_in: Annotated[float, typer.Option(min=0, help="USD a million tokens of requests.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="USD a million tokens of replies.")] = 0.0,
    cap: Annotated[
        float | None,
        typer.Option(min=0, help="USD, over all calls with one --out: what may go over is not asked."),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Exit code 0 also where answers or verdicts are missing.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
) -> None:
    """Grade answers by a judge model (1 to 10), or compare them in pairs; print scores with their uncertainty.

    The key is read from OPENAI_API_KEY (ANTHROPIC_API_KEY for Anthropic's servers) and written nowhere. What has its
    verdict is not asked again. Exit code 3 where the table lacks answers or verdicts.
    """
    check_output(out / "replies.jsonl", REPLIES, [*sources, baseline, questions])
    command, client = _late("command"), _late("client")
    cost, options = _late("cost"), _late("options")
    settings = client.Settings(model, base_url, most_tokens, seconds, retries, rate)
    asked = options.JudgeOptions(
        bench=bench,
        questions=questions,
        baseline=baseline,
        all_pairs=pairwise_all,
        references=references,
        concurrency=concurrency,
        attempts=attempts,
        prices=cost.Prices(price_in, price_out),
        cap=cap,
        dry=dry_run,
    )
    made = command.judge_command(sources, settings, asked, out, lambda text: say(text, err=True))
    say(made.table)
    end_incomplete(made.incomplete, allow_partial)


def end_incomplete(lines: Sequence[str], allowed: bool) -> None:
    """Say what a table lacks, and end with exit code 3 unless that is allowed."""
    for line in lines:
        say(f"incomplete: {line}", err=True)
    if lines and not allowed:
        say("exit code 3: the result is incomplete; --allow-partial takes it as it is", err=True)
        raise typer.Exit(3)


def _late(module: str) -> Any:
    """A module of ours that imports openai."""
    try:
        return import_module(f"intactkv_eval.judge.{module}")
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ConfigError("the judge needs the openai package: pip install openai") from None
