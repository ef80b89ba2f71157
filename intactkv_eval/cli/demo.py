"""`intactkv demo`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.sanitize import say
from intactkv_eval.storage.files import cache_folder


def demo(
    folder: Annotated[Path | None, typer.Option(help="The folder that keeps the model and the results.")] = None,
) -> None:
    """Run the main job on a real small model, and print the table (about three minutes on two cores)."""
    from intactkv_eval.demo import run_demo

    say(run_demo(folder or cache_folder() / "demo", lambda text: say(text, err=True)))
