"""Which model arguments run code, write where they say, or are credentials, and who may give them.

A file may be another's: a sweep, a cell, a model's config. What runs code is therefore taken from the command line (or
from Python) alone. This table is the only place where such keys are named. Knows no model and no file.
"""

from collections.abc import Mapping
from typing import Any

from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import is_secret_key

TRUST = "trust_remote_code"
_RUNS = {
    TRUST: "runs the Python code of a model's repository",
    "code_revision": "chooses the Python code of a model's repository",
    "custom_generate": "runs the Python code of a repository",
    "use_kernels": "loads compiled code from the hub",
    "kernel_config": "loads compiled code from the hub",
    "allow_all_kernels": "loads compiled code from the hub",
    "confirm_run_unsafe_code": "runs the code that a model writes",
    "allow_code_execution": "runs the code that a model writes",
    "offload_folder": "writes files where it says",
    "cache_dir": "writes files where it says",
}
_TAKEN = {TRUST, "offload_folder", "cache_dir"}
"""Of these what the command line takes; the others are arguments of transformers or lm_eval that nothing here takes."""
_KERNELS = ("attn_implementation", "experts_implementation")
_LOADS = "names a kernel of the hub (with a slash), which is compiled code that would be loaded"
_MOST_LEVELS = 200


def check_no_code(value: Any, where: str, instead: str) -> None:
    """Raise ConfigError where a document that may be a stranger's asks to run code, or to write elsewhere.

    Args:
        value: Mappings and lists of plain values, at most 200 levels deep; every mapping in it is looked at.
        where: The file, for the message.
        instead: How the key is given on the command line; `{key}` and `{value}` stand for it.

    Raises:
        ConfigError: It names the key, the file, and the right way. A key that is false or null is none.
    """
    waiting = [(value, 0)]
    while waiting:
        part, level = waiting.pop()
        if level > _MOST_LEVELS:
            raise ConfigError(f"{where}: nested more than {_MOST_LEVELS} levels deep")
        if isinstance(part, Mapping):
            for key, held in part.items():
                _check_key(str(key), held, where, instead)
        if isinstance(part, Mapping | list | tuple):
            inside = part.values() if isinstance(part, Mapping) else part
            waiting += [(one, level + 1) for one in inside if isinstance(one, Mapping | list | tuple)]


def _check_key(key: str, value: Any, where: str, instead: str) -> None:
    if value in (None, False, "", "false", "False", "None"):
        return
    reason = _RUNS.get(key) or (_LOADS if names_kernel(key, value) else None)
    if reason is not None:
        flag = f"--trust-remote-code (intactkv eval: --model_args {TRUST}=True)"
        said = flag if key == TRUST else instead.format(key=key, value="True" if value is True else value)
        right = f"remove it from the file, and if you trust it, give {said}"
        if key in _RUNS and key not in _TAKEN:
            right = "remove it from the file; it is taken from nowhere here"
        raise ConfigError(
            f"{where}: {key} {reason}. A file may be a stranger's, so it is taken from the command line alone: {right}"
        )
    check_not_secret(key, where)


def names_kernel(key: str, value: Any) -> bool:
    """Whether the argument loads a kernel from the hub: ORG/NAME, alone or for a part of the model."""
    name = key.strip("_").removesuffix("_internal")
    parts = value.values() if isinstance(value, Mapping) else (value,)
    return name in _KERNELS and any(isinstance(part, str) and "/" in part for part in parts)


def check_not_secret(key: str, where: str = "") -> None:
    """Raise ConfigError for a key whose value is a credential: arguments are recorded, logged and shown."""
    if is_secret_key(key):
        raise ConfigError(
            f"{where}{': ' if where else ''}{key}: a credential is not taken as an argument, since arguments are "
            "written to results, logs and pages; log in once with `hf auth login`, or set the environment variable "
            "HF_TOKEN (for the judge OPENAI_API_KEY)"
        )
