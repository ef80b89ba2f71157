"""`intactkv report`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.cli.incomplete import end_incomplete
from intactkv_eval.commands.outputs import TABLES, check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say
from intactkv_eval.storage.files import write_atomic


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders (or files) with lm_eval's results JSON.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write: .md, .csv, .tex, .json or .html; printed if none is given.")
    ] = None,
    leaves: Annotated[bool, typer.Option("--leaves", help="Show the tasks inside of groups, not the groups.")] = False,
    figures: Annotated[list[Path] | None, typer.Option(help="Pictures for an .html page, or a folder of them.")] = None,
    allow_partial: shared.AllowPartial = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Tabulate runs: values, deltas to baseline and full precision with their significance, share recovered."""
    from intactkv_eval.report.collect import collect
    from intactkv_eval.report.incomplete import incomplete_sets
    from intactkv_eval.report.page import page
    from intactkv_eval.report.planned import absent_of, files_below
    from intactkv_eval.report.tables import FORMATS

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
    end_incomplete(incomplete_sets(scored), allow_partial)
