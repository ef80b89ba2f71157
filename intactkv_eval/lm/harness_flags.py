"""What a user has given to lm_eval's command line, told from what lm_eval fills in by itself.

lm_eval hands its own defaults (device=cuda:0, batch_size=1) to the model class as if the user had chosen them.
"""

import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

from intactkv_eval.cell.trust import check_not_secret
from intactkv_eval.compat.lm_eval_api import EvaluatorConfig, HarnessCLI, simple_parse_args_string
from intactkv_eval.errors import ConfigError, IntactKVError, unknown_key
from intactkv_eval.lm.generation_options import check_options
from intactkv_eval.lm.hf_arguments import check_names, split_model_args
from intactkv_eval.lm.plugin import NAME
from intactkv_eval.model.devices import automatic_device, check_device
from intactkv_eval.sanitize import clean_logs, say
from intactkv_eval.storage.documents import parse_yaml_of_two
from intactkv_eval.storage.limits import read_bytes

_ON_A_DEVICE = {NAME, "hf", "hf-auto", "huggingface"}  # model classes that take the CPU for a device that is not here


def read_flags_file(parsed: Namespace) -> dict[str, Any]:
    """The flags of lm_eval's --config YAML; none where there is no such file. Raises ConfigError."""
    path = getattr(parsed, "config", None)
    if not path:
        return {}
    try:
        loaded = parse_yaml_of_two(read_bytes(Path(path)).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"--config {path}: expected a mapping of lm_eval's flags")
    return loaded


def chosen_flags(arguments: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The `flags` that lm_eval hands to a model class beside its `arguments`, without defaults that nobody chose.

    Left out is a default for a key that is among the arguments, or for a device that is not here. Raises ConfigError
    where the user has given one key as both, and first of all for an argument that nobody knows.
    """
    check_names(*split_model_args(arguments))
    handed = {key: value for key, value in flags.items() if value is not None}
    given = _given_to_lm_eval()
    defaults = {key for key in handed if given is not None and given.get(key) is None}
    for key in handed.keys() & {key for key, value in arguments.items() if value is not None}:
        if key not in defaults:
            raise ConfigError(
                f"{key}: given twice, as {key}={str(arguments[key])[:80]} among the model's arguments and as "
                f"--{key} {str(handed[key])[:80]}; keep one"
            )
    dropped = {key for key in defaults if key in arguments or (key == "device" and automatic_device() == "cpu")}
    return {key: value for key, value in handed.items() if key not in dropped}


def check_flag_names(path: str | None, flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key of the --config YAML `path` that is no flag of lm_eval."""
    known = [field.name for field in fields(EvaluatorConfig)]
    for key in flags:
        if key not in known:
            raise ConfigError(f"--config {path}: {unknown_key(str(key), known)}")


def check_device_flag(flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for a --device that is not here, where the model class would take the CPU instead."""
    if flags.get("model") in _ON_A_DEVICE:
        check_device(flags.get("device"), "--device ")


def check_no_secrets(flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for a credential among the arguments of any model class, since lm_eval records them."""
    given = flags.get("model_args") or {}
    for key in simple_parse_args_string(given) if isinstance(given, str) else given:
        check_not_secret(str(key), "--model_args")


def check_generation_flags(flags: Mapping[str, Any]) -> None:
    """Raise ConfigError for --gen_kwargs that nobody reads, or that transformers' `generate` would refuse."""
    given = flags.get("gen_kwargs")
    if given:
        check_options(simple_parse_args_string(given) if isinstance(given, str) else given)


def begin_command() -> None:
    """In a run of lm_eval's command, before a model is loaded: its generation options are checked, its errors told.

    Raises ConfigError.
    """
    clean_logs()
    flags = _given_to_lm_eval()
    if flags is not None:
        errors_in_one_message()
        check_generation_flags(flags)


def errors_in_one_message() -> None:
    """Let an error of the user end lm_eval's own command in one message and exit code 2, as `intactkv` does."""
    other = sys.excepthook

    def told(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, IntactKVError):
            other(kind, error, trace)
            return
        say(f"intactkv: {error}", err=True)
        raise SystemExit(2)  # of which Python makes the exit code

    sys.excepthook = told


def _given_to_lm_eval() -> dict[str, Any] | None:
    """What stands in lm_eval's command line and its --config YAML; None where this process is no lm_eval command."""
    program = Path(sys.argv[0])
    if program.stem not in {"lm_eval", "lm-eval"} and program.parent.name != "lm_eval":
        return None
    try:
        parsed = HarnessCLI().parse_args()
    except SystemExit:
        return None
    return {**read_flags_file(parsed), **{key: value for key, value in vars(parsed).items() if value is not None}}
