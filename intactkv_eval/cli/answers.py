"""`intactkv answers`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import ANSWERS, check_output
from intactkv_eval.sanitize import say


def answers(
    sources: shared.Answers,
    out: Annotated[Path, typer.Option(help="The folder to write: one NAME.jsonl for each run.")],
    bench: shared.QuestionSet = "mt_bench",
    overwrite: shared.Overwrite = False,
) -> None:
    """Write the answers of runs as FastChat's model_answer files."""
    from intactkv_eval.judge.entries import export_answers, load_entries

    for entry in load_entries(sources, bench):
        check_output(out / f"{entry.name}.jsonl", ANSWERS, sources, overwrite)
    for path in export_answers(sources, out, bench):
        say(path)
