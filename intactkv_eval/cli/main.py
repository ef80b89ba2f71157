"""The command `intactkv`: its groups of commands, and its exit codes.

0; 1 an error of ours; 2 the user's fault, with one message and no traceback; 3 a result that is incomplete.
"""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from intactkv_eval import __version__
from intactkv_eval.cli.answers import answers
from intactkv_eval.cli.bench import bench
from intactkv_eval.cli.calibrate import calibrate
from intactkv_eval.cli.capture import capture
from intactkv_eval.cli.demo import demo
from intactkv_eval.cli.eval import PASS_ON, evaluate
from intactkv_eval.cli.figures import figures
from intactkv_eval.cli.judge import judge
from intactkv_eval.cli.kv_codebook import kv_codebook
from intactkv_eval.cli.pivots import pivots
from intactkv_eval.cli.quantize import quantize
from intactkv_eval.cli.report import report
from intactkv_eval.cli.sweep import sweep
from intactkv_eval.cli.tasks import tasks
from intactkv_eval.errors import IntactKVError, panics_named
from intactkv_eval.sanitize import clean_logs, say

_CELL = "pretrained=MODEL,weights=rtn,bits=3"
app = typer.Typer(
    name="intactkv",
    help="Measure how much quantization loss an intact pivot KV cache recovers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS: dict[str, dict[str, tuple[Callable[..., None], str]]] = {
    "Measure": {
        "demo": (demo, "intactkv demo"),
        "eval": (evaluate, ""),
        "sweep": (sweep, "intactkv sweep table1 --out runs/table1 --dry-run"),
        "bench": (bench, "intactkv bench scoring --batch-size 8 --limit 100"),
        "tasks": (tasks, "lm_eval --tasks ppl_wikitext2 --include_path $(intactkv tasks) --model intactkv ..."),
    },
    "Pivots": {
        "pivots": (pivots, "intactkv pivots MODEL --data wikitext2 --out prefix.json"),
        "capture": (capture, "intactkv capture MODEL --pivot bos --out bos.safetensors"),
        "calibrate": (calibrate, f"intactkv calibrate --model_args {_CELL} --data chats.json --out pivot.safetensors"),
        "figures": (figures, f"intactkv figures --model_args {_CELL},pivot=bos --out figures"),
    },
    "Quantize": {
        "quantize": (quantize, "intactkv quantize MODEL --method gptq --bits 3 --out model-w3"),
        "kv-codebook": (kv_codebook, "intactkv kv-codebook MODEL --data wikitext2 --bits 3 --out codebook.safetensors"),
    },
    "Report": {
        "report": (report, "intactkv report runs/table1 --out table.md"),
        "answers": (answers, "intactkv answers runs/mt_bench --out answers"),
        "judge": (judge, "intactkv judge runs/mt_bench --model gpt-4-0613 --out verdicts --dry-run"),
    },
}
"""By group of the help, by name: the command and an example of its page."""
for _group, _commands in COMMANDS.items():
    for _name, (_function, _example) in _commands.items():
        app.command(
            _name,
            rich_help_panel=_group,
            epilog=f"Example: {_example}" if _example else None,
            context_settings=None if _example else PASS_ON,  # `eval` writes its own page
        )(_function)


@app.callback(invoke_without_command=True)
def _top(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        say(__version__)
        raise typer.Exit


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
