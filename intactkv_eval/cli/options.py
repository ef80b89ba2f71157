"""Options that several commands share: one name, one help text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval.commands.outputs import REPLACES
from intactkv_eval.errors import ConfigError

ModelName = Annotated[str, typer.Argument(help="The full-precision model: a folder or a hub id.")]
ModelArgs = Annotated[
    str, typer.Option("--model_args", "--model-args", help="The keys of the cell, as for `intactkv eval`.")
]
Data = Annotated[str, typer.Option(help="The text: wikitext2, c4, pile, or a .txt or .jsonl file.")]
Seed = Annotated[int, typer.Option(help="The seed that draws the pieces of the text.")]
Dtype = Annotated[str, typer.Option(help="The dtype of the evaluation: auto, float32, bfloat16 or float16.")]
Revision = Annotated[str, typer.Option(help="The branch, tag or commit on the hub.")]
ChatTemplate = Annotated[
    str | None, typer.Option(help="The name of a template in model_configs/chat_templates, or a .jinja file.")
]
ChatDate = Annotated[str | None, typer.Option(help="The date that chat templates write, for instance 2026-11-28.")]
Device = Annotated[str, typer.Option(help="The device: cpu, cuda, cuda:0, ...")]
TrustRemoteCode = Annotated[bool, typer.Option(help="Run the model repository's own code.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help=REPLACES)]
AllowPartial = Annotated[
    bool, typer.Option("--allow-partial", help="Exit with code 0 although answers or verdicts are missing.")
]
Answers = Annotated[
    list[Path], typer.Argument(help="Runs of lm_eval with --log_samples, or answer files in FastChat's layout.")
]
QuestionSet = Annotated[str, typer.Option(help="The set of questions: mt_bench or vicuna_bench.")]


def cell_and_loading(model_args: str, device: str, trust_remote_code: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split --model_args into the keys of the cell and the arguments of lm_eval's `hf`.

    Raises ConfigError for a key that is unknown or given twice.
    """
    from intactkv_eval.lm.hf_arguments import check_names, split_model_args

    arguments, loading = split_model_args(model_args)
    check_names(arguments, loading)
    for name, value in (("device", device), ("trust_remote_code", trust_remote_code)):
        if name in loading:
            raise ConfigError(f"{name}: give it once, as --{name.replace('_', '-')}")
        loading[name] = value
    return arguments, loading


def full_precision_cell(model: str, pivot: str, **others: str | None) -> dict[str, str | None]:
    """The keys of the cell of a command that takes a full-precision model and its pivot."""
    return {"pretrained": model, "pivot": pivot, **others}
