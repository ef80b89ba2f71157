"""The command `intactkv`: its groups of commands, and its exit codes.

0; 1 an error of ours; 2 the user's fault, with one message and no traceback; 3 a result that is incomplete.
"""

import sys
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
from intactkv_eval.errors import IntactKVError
from intactkv_eval.sanitize import clean_logs, say

app = typer.Typer(
    name="intactkv",
    help="Measure how much quantization loss an intact pivot KV cache recovers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

MEASURE, PIVOTS, QUANTIZE, REPORT = "Measure", "Pivots", "Quantize", "Report"


def _example(command: str) -> str:
    return f"Example: {command}"


app.command(
    rich_help_panel=MEASURE,
    epilog=_example("intactkv demo"),
)(demo)
app.command(
    "eval",
    rich_help_panel=MEASURE,
    context_settings=PASS_ON,
)(evaluate)
app.command(
    rich_help_panel=MEASURE,
    epilog=_example("intactkv sweep table1 --out runs/table1 --dry-run"),
)(sweep)
app.command(
    rich_help_panel=MEASURE,
    epilog=_example("intactkv bench scoring --batch-size 8 --limit 100"),
)(bench)
app.command(
    rich_help_panel=MEASURE,
    epilog=_example("lm_eval --tasks ppl_wikitext2 --include_path $(intactkv tasks) --model intactkv ..."),
)(tasks)
app.command(
    rich_help_panel=PIVOTS,
    epilog=_example("intactkv pivots meta-llama/Llama-2-7b-hf --data wikitext2 --out prefix.json"),
)(pivots)
app.command(
    rich_help_panel=PIVOTS,
    epilog=_example("intactkv capture meta-llama/Llama-2-7b-hf --pivot bos --out bos.safetensors"),
)(capture)
app.command(
    rich_help_panel=PIVOTS,
    epilog=_example(
        "intactkv calibrate --model-args pretrained=MODEL,weights=rtn,bits=3 --data chats.json --out kv.safetensors"
    ),
)(calibrate)
app.command(
    rich_help_panel=PIVOTS,
    epilog=_example("intactkv figures --model-args pretrained=MODEL,weights=rtn,bits=3,pivot=bos --out figures"),
)(figures)
app.command(
    rich_help_panel=QUANTIZE,
    epilog=_example("intactkv quantize meta-llama/Llama-2-7b-hf --method gptq --bits 3 --out llama-w3"),
)(quantize)
app.command(
    "kv-codebook",
    rich_help_panel=QUANTIZE,
    epilog=_example("intactkv kv-codebook MODEL --data wikitext2 --bits 3 --out codebook.safetensors"),
)(kv_codebook)
app.command(
    rich_help_panel=REPORT,
    epilog=_example("intactkv report runs/table1 --out table.md"),
)(report)
app.command(
    rich_help_panel=REPORT,
    epilog=_example("intactkv answers runs/mt_bench --out answers"),
)(answers)
app.command(
    rich_help_panel=REPORT,
    epilog=_example("intactkv judge runs/mt_bench --model gpt-4-0613 --out verdicts --dry-run"),
)(judge)


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
        app()
    except IntactKVError as error:
        say(f"intactkv: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.filename is None:  # not about a file that the user named
            raise
        say(f"intactkv: {error.filename}: {error.strerror}", err=True)
        sys.exit(2)
