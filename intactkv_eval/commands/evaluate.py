"""What `intactkv eval` does: lm_eval's own command line with our model and tasks filled in.

Everything that can be checked is checked before a model is loaded, so that a bad call ends at once with one message.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path

from intactkv_eval.compat.lm_eval_api import HarnessCLI, setup_logging
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.batch_size import check_batch_size
from intactkv_eval.lm.evaluate_task import cache_explained, check_known, check_tasks, check_written, results_below
from intactkv_eval.lm.harness_flags import (
    check_device_flag,
    check_flag_names,
    check_generation_flags,
    check_no_secrets,
    read_flags_file,
)
from intactkv_eval.lm.hf_arguments import checked_cell, split_model_args
from intactkv_eval.lm.plugin import NAME
from intactkv_eval.lm.result_stamps import stamps_of_results
from intactkv_eval.storage.files import check_writable, shipped_folder


def run_lm_eval(arguments: list[str]) -> None:
    """`lm_eval run` with --model intactkv and our tasks/ added to --include_path.

    Raises ConfigError for an empty or unknown task list, a bad batch size, cell or output folder; whatever the run
    itself raises otherwise; CheckpointError where it could not write its results.
    """
    sys.argv = ["lm_eval", "run", *_with_default_model(arguments)]
    setup_logging()
    command = HarnessCLI()
    parsed = command.parse_args()
    _fill_in(parsed)
    _check(parsed)
    out = _output_of(parsed)
    before = results_below(out) if out is not None else {}
    with cache_explained(), stamps_of_results() as stamps:
        command.execute(parsed)
    if out is not None and os.environ.get("RANK", "0") == "0":
        check_written(out, before, bool(getattr(parsed, "log_samples", False)), stamps)


def _with_default_model(arguments: list[str]) -> list[str]:
    named = any(argument in {"--model", "-M"} or argument.startswith("--model=") for argument in arguments)
    return arguments if named or "--config" in arguments else ["--model", NAME, *arguments]


def _fill_in(parsed: Namespace) -> None:
    """Our tasks first, the user's after them, so that a name of theirs wins."""
    from_file = read_flags_file(parsed)
    theirs = getattr(parsed, "include_path", None) or from_file.get("include_path")
    parsed.include_path = [str(shipped_folder("tasks")), *([theirs] if isinstance(theirs, str) else theirs or [])]
    if not getattr(parsed, "model", None) and not from_file.get("model"):
        parsed.model = NAME


def _output_of(parsed: Namespace) -> Path | None:
    named = getattr(parsed, "output_path", None) or read_flags_file(parsed).get("output_path")
    return Path(named) if named else None


def _check(parsed: Namespace) -> None:
    from_file = read_flags_file(parsed)
    settings = {**from_file, **{key: value for key, value in vars(parsed).items() if value is not None}}
    check_flag_names(getattr(parsed, "config", None), from_file)
    if settings["model"] == NAME:
        check_known()
        checked_cell(*split_model_args(settings.get("model_args") or {}))
        check_generation_flags(settings)
    check_no_secrets(settings)
    check_device_flag(settings)
    check_batch_size(settings.get("batch_size"))
    if settings.get("output_path"):
        path = Path(settings["output_path"])
        check_writable(path.parent if path.suffix in {".json", ".jsonl"} else path)
    if (settings.get("log_samples") or settings.get("predict_only")) and not settings.get("output_path"):
        raise ConfigError("--log_samples: names no place for the samples; add --output_path")
    if settings.get("samples") and not settings.get("log_samples"):
        raise ConfigError(
            "--samples: results do not say which documents these were; add --log_samples --output_path DIR"
        )
    listed = settings.get("tasks") or []
    names = [part.strip() for task in ([listed] if isinstance(listed, str) else listed) for part in task.split(",")]
    check_tasks([name for name in names if name], settings["include_path"])
