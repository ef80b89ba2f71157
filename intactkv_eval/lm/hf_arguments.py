"""The arguments of `hf` that IntactKVLM hands on; any other key that is no cell's is a mistake of the user."""

import inspect
from collections.abc import Mapping
from typing import Any

from intactkv_eval.cell.arguments import CELL_KEYS, cell_from_args, flat_arguments, unknown_argument
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.cell.trust import check_not_secret
from intactkv_eval.compat.lm_eval_api import HFLM, simple_parse_args_string
from intactkv_eval.errors import ConfigError
from intactkv_eval.model.devices import check_device

# What hf hands on to transformers' from_pretrained.
_LOADING_KEYS = """
    attn_implementation cache_dir device_map force_download local_files_only low_cpu_mem_usage
    max_memory offload_buffers offload_state_dict use_safetensors variant
""".split()  # noqa: SIM905  read more easily as a paragraph
# What describes `pretrained` alone, and must not be applied to a full-precision `reference`.
OF_PRETRAINED = {"quantization_config", "gguf_file", "subfolder"}
ADAPTERS = {"peft", "delta"}
"""What is added to the weights of `pretrained`, and so to those of the full-precision `reference` behind them."""
_OWN_HF_KEYS = {"self", "kwargs", "pretrained", "revision", "dtype", "backend"}
_NOT_TAKEN = {
    "autogptq": "name the checkpoint with pretrained=...",
    "gptqmodel": "name the checkpoint with pretrained=...",
    "tp_plan": "use parallelize=True",
    "mixed_precision_dtype": "choose dtype=...",
    "truncation": "contexts that are too long are always cut from the left, and counted",
    "logits_cache": "equal inputs are always computed once",
}
HF_KEYS = [
    key for key in inspect.signature(HFLM.__init__).parameters if key not in _OWN_HF_KEYS and key not in _NOT_TAKEN
]
KNOWN = (*HF_KEYS, *_LOADING_KEYS)


def chat_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `hf` with these arguments gives to a chat template, beside the messages."""
    thinking = arguments.get("enable_thinking")
    given = {} if thinking is None else {"enable_thinking": thinking}
    return {**(arguments.get("chat_template_args") or {}), **given}


def split_model_args(given: str | Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm_eval's --model_args: the keys of a cell, and those of its `hf`."""
    arguments = simple_parse_args_string(given) if isinstance(given, str) else given
    own = {key: value for key, value in arguments.items() if key in CELL_KEYS}
    return own, {key: value for key, value in arguments.items() if key not in CELL_KEYS}


def checked_cell(cell: Mapping[str, Any], loading: Mapping[str, Any]) -> CellSpec:
    """The cell of its flat arguments, beside those of lm_eval's `hf`.

    Raises ConfigError: for unknown keys, the config YAML's among them, before any value is judged.
    """
    check_names(cell, loading)
    _check_hf_arguments(loading)
    return cell_from_args(cell)


def check_names(cell: Mapping[str, Any], loading: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that neither a cell has, nor `hf` or from_pretrained takes; of a config YAML too.

    `token` is the one key of from_pretrained that is not taken: arguments are recorded, and it is a credential.
    """
    for key in loading:
        check_not_secret(key)
        if key not in KNOWN and key not in _NOT_TAKEN:
            raise unknown_argument(key, [*KNOWN, *CELL_KEYS])
    flat_arguments(cell, KNOWN)


def _check_hf_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that would do nothing here, or a device that is not here."""
    for key in arguments:
        if key in _NOT_TAKEN:
            raise ConfigError(f"{key}: not taken by intactkv; {_NOT_TAKEN[key]}, or use --model hf")
    check_device(arguments.get("device"))
    if arguments.get("device_map") is not None and not arguments.get("parallelize"):
        raise ConfigError("device_map: hf reads it only with parallelize=True; add that, or choose device=...")
    if arguments.get("max_length") is not None and int(arguments["max_length"]) < 1:
        raise ConfigError(f"max_length={arguments['max_length']}: use a positive number of tokens")


def check_front(arguments: Mapping[str, Any], token_ids: tuple[int, ...], tokenizer: Any) -> None:
    """Raise ConfigError for a key of `hf` on what stands in front of texts, where the pivot does so anyway.

    add_bos_token=False may still keep other special tokens out, such as an EOS at the end of every text.
    """
    prefix = arguments.get("prefix_token_id")
    if prefix is not None and token_ids and int(prefix) != token_ids[0]:
        raise ConfigError(
            f"prefix_token_id={prefix}: does nothing, since token {token_ids[0]} stands in front of every request; "
            f"leave it out, or put that token in front with pivot=tokens:{prefix}"
        )
    own = tokenizer.bos_token_id
    if arguments.get("add_bos_token") in {None, True} or own is None or token_ids[:1] != (own,):
        return
    added = tokenizer.encode("x")
    if added[added[:1] == [own] :] == tokenizer.encode("x", add_special_tokens=False):
        raise ConfigError(
            f"add_bos_token=False: does nothing, since {tokenizer.bos_token!r} stands in front of every request of "
            "this cell; leave it out, put another token in front with pivot=tokens:ID, or use --model hf"
        )
