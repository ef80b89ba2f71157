"""`intactkv eval`."""

from collections.abc import Iterator

import typer

from intactkv_eval.sanitize import say

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_EXAMPLE = "intactkv eval --model_args pretrained=MODEL,weights=rtn,bits=4,pivot=bos --tasks ppl_wikitext2"


def evaluate(context: typer.Context) -> None:
    """Evaluate a cell on tasks: lm_eval's own flags, with --model intactkv and our tasks/ filled in.

    `intactkv eval --help` lists the keys of a cell, and lm_eval's flags.
    """
    if not context.args or {"-h", "--help"} & set(context.args):
        for line in _help():
            say(line)
        return
    from intactkv_eval.commands.evaluate import run_lm_eval

    run_lm_eval(context.args)


def _help() -> Iterator[str]:
    from intactkv_eval.cell.arguments import KEYS
    from intactkv_eval.compat.lm_eval_api import help_of_run

    yield f"Usage: intactkv eval [FLAGS OF lm_eval run]\n\nExample: {_EXAMPLE}\n"
    yield "Keys of a cell, for --model_args key=value,key=value (all that lm_eval's `hf` takes goes there too):\n"
    for name, key in KEYS.items():
        yield f"  {name:20} {key.help}"
    yield f"\nFlags of lm_eval:\n\n{help_of_run()}"
