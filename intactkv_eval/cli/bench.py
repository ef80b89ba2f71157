"""`intactkv bench`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


class Benchmark(str, Enum):
    """What `intactkv bench` measures."""

    scoring = "scoring"
    decode = "decode"
    loading = "loading"
    multi_turn = "multi-turn"
    report = "report"


def bench(
    what: Annotated[Benchmark, typer.Argument(help="What to measure.")] = Benchmark.scoring,
    model: Annotated[
        str | None, typer.Option(help="The model, a folder or a hub id; the demo's if none is given.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="scoring: the task; may be repeated.")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="scoring: the rows of a batch; of several, hf's fastest counts."),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="scoring: the dtype; float32 and bfloat16 if none is given.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="scoring: the documents of each task. multi-turn: the questions (8)."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="The runs of each (3); the median counts.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="multi-turn: the largest number of new tokens of an answer (64).")
    ] = None,
    files: Annotated[int | None, typer.Option(min=1, help="report: the number of results files (10000).")] = None,
) -> None:
    """Measure against a rival in one run, lm_eval's own hf if none is named; a ratio is shown only if answers agree.

    scoring: log-likelihoods. decode: tokens a second on packed weights. loading: peak memory of a packed checkpoint.
    multi-turn: MT-Bench's conversations, against transformers' generate question by question. report: reading and
    comparing many results files, made for it, against json.loads of them.
    """
    scores, turns = what is Benchmark.scoring, what is Benchmark.multi_turn
    idle = {"--task": task and not scores, "--batch-size": batch_size and not scores, "--dtype": dtype and not scores,
            "--limit": limit and not (scores or turns), "--tokens": tokens and not turns,
            "--files": files and what is not Benchmark.report,
            "--model": model and what is Benchmark.report}  # fmt: skip
    for name, value in idle.items():
        if value:
            raise ConfigError(f"{name}: does nothing for bench {what.value}")
    if repeats is not None and what is Benchmark.loading:
        raise ConfigError("--repeats: does nothing for bench loading, whose peak is the same each time")
    if what is Benchmark.loading:
        if model is None:
            raise ConfigError("bench loading: name the packed checkpoint's folder with --model")
        from intactkv_eval.bench.loading import loading

        say(loading(Path(model)))
    elif what is Benchmark.report:
        from intactkv_eval.bench.report import report

        say(report(files or 10_000, repeats or 1))
    elif what is Benchmark.decode:
        from intactkv_eval.bench.decode import decode

        say(decode(model, repeats or 3))
    elif turns:
        from intactkv_eval.bench.multi_turn import multi_turn

        say(multi_turn(model, limit or 8, tokens or 64, repeats or 3))
    else:
        from intactkv_eval.bench.scoring import DEMO_TASK, scoring

        kinds = dtype or ["float32", "bfloat16"]
        say(scoring(model, task or [DEMO_TASK], batch_size or [1, 8, 32], repeats or 3, kinds, limit))
