"""How a command ends whose table lacks answers or verdicts."""

from collections.abc import Sequence

import typer

from intactkv_eval.sanitize import say


def end_incomplete(lines: Sequence[str], allowed: bool) -> None:
    """Print what a table lacks, and end with exit code 3 unless that is allowed."""
    for line in lines:
        say(f"incomplete: {line}", err=True)
    if lines and not allowed:
        say("exit code 3: the result is incomplete; --allow-partial takes it as it is", err=True)
        raise typer.Exit(3)
