"""`intactkv judge`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.cli.incomplete import end_incomplete
from intactkv_eval.commands.outputs import REPLIES, check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


def judge(
    sources: shared.Answers,
    model: Annotated[str, typer.Option(help="The judge, as its server names it, for instance gpt-4-0613.")],
    out: Annotated[
        Path, typer.Option(help="The folder of replies, judgments and results; a second run continues in it.")
    ],
    base_url: Annotated[
        str | None, typer.Option(help="Another server, OpenAI-compatible or Anthropic's: http://host:port/v1")
    ] = None,
    bench: shared.QuestionSet = "mt_bench",
    questions: Annotated[Path | None, typer.Option(help="A folder of questions in FastChat's layout.")] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Answers against which pairs are judged, in both orders.")
    ] = None,
    pairwise_all: Annotated[bool, typer.Option("--pairwise-all", help="Judge pairs of every two models.")] = False,
    references: Annotated[
        str | None,
        typer.Option(help="Whose reference answers stand beside math, reasoning and coding; the judge's own if none."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="The number of requests at a time.")] = 4,
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.01, help="The largest number of requests a minute.")
    ] = None,
    retries: Annotated[
        int, typer.Option(min=0, help="The retries of a request that the server or the network fails.")
    ] = 8,
    attempts: Annotated[int, typer.Option(min=1, help="The attempts at a request whose reply holds no verdict.")] = 3,
    timeout: Annotated[float, typer.Option(min=1, help="The seconds until a request is given up.")] = 120.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="The largest number of tokens of a reply.")] = 2048,
    price_in: Annotated[float, typer.Option(min=0, help="The price in USD of a million tokens of requests.")] = 0.0,
    price_out: Annotated[float, typer.Option(min=0, help="The price in USD of a million tokens of replies.")] = 0.0,
    cap: Annotated[
        float | None,
        typer.Option(min=0, help="The USD that all calls with one --out may cost; what may go over is not asked."),
    ] = None,
    allow_partial: shared.AllowPartial = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and stop.")] = False,
) -> None:
    """Grade answers by a judge model (1 to 10), or compare them in pairs; print scores with their uncertainty.

    The key is read from OPENAI_API_KEY (ANTHROPIC_API_KEY for Anthropic's servers) and written nowhere. What has its
    verdict is not asked again. Exit code 3 where the table lacks answers or verdicts.
    """
    check_output(out / "replies.jsonl", REPLIES, [*sources, baseline, questions])
    try:
        from intactkv_eval.commands.judge import judge_command
        from intactkv_eval.judge.client import JudgeServer
        from intactkv_eval.judge.cost import Prices
        from intactkv_eval.judge.options import JudgeOptions
    except ModuleNotFoundError as error:
        if error.name != "openai":
            raise
        raise ConfigError("the judge needs the openai package: pip install openai") from None
    server = JudgeServer(model, base_url, max_tokens, timeout, retries, requests_per_minute)
    options = JudgeOptions(
        bench=bench,
        questions=questions,
        baseline=baseline,
        all_pairs=pairwise_all,
        references=references,
        concurrency=concurrency,
        attempts=attempts,
        prices=Prices(price_in, price_out),
        cap=cap,
        dry=dry_run,
    )
    result = judge_command(sources, server, options, out, lambda text: say(text, err=True))
    say(result.table)
    end_incomplete(result.incomplete, allow_partial)
