"""The commands `intactkv judge` and `intactkv answers`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval.errors import ConfigError
from intactkv_eval.messages import say
from intactkv_eval.outputs import ANSWERS, REPLACES, REPLIES, check_output

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
    base_url: Annotated[str | None, typer.Option(help="Another OpenAI-compatible server: http://host:port/v1")] = None,
    bench: BenchName = "mt_bench",
    questions: Annotated[Path | None, typer.Option(help="Local data in FastChat's layout.")] = None,
    baseline: Annotated[Path | None, typer.Option(help="Judge pairs against these answers, in both orders.")] = None,
    references: Annotated[str, typer.Option(help="Whose reference answers, for math, reasoning, coding.")] = "gpt-4",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    rate: Annotated[float | None, typer.Option(min=0.01, help="Most requests a minute.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Of a request that the server or the network fails.")] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="Of a request whose reply holds no verdict.")] = 3,
    seconds: Annotated[float, typer.Option(min=1, help="Until a request is given up.")] = 120.0,
    most_tokens: Annotated[int, typer.Option(min=1, help="Of a reply.")] = 2048,
    price_in: Annotated[float, typer.Option(min=0, help="USD a million tokens of requests.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="USD a million tokens of replies.")] = 0.0,
    cap: Annotated[float | None, typer.Option(min=0, help="USD: no request is sent once they are spent.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
) -> None:
    """Grade answers by a judge model (1 to 10), or against a baseline in pairs; print scores with their uncertainty.

    The key is read from OPENAI_API_KEY and written nowhere. What has its verdict is not asked again.
    """
    check_output(out / "replies.jsonl", REPLIES, [*sources, baseline, questions])
    command = _command()
    settings = command.Settings(model, base_url, most_tokens, seconds, retries, rate)
    prices = command.Prices(price_in, price_out)
    asked = command.Asked(bench, questions, baseline, references, concurrency, attempts, prices, cap, dry_run)
    say(command.judge_command(sources, settings, asked, out, lambda text: say(text, err=True)))


def _command() -> Any:
    try:
        return import_module("intactkv_eval.judge.command")
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ConfigError("the judge needs the openai package: pip install openai") from None
