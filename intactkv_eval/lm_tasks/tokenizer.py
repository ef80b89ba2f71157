"""The tokenizer of the evaluated model, for tasks whose documents are defined in its tokens.

lm_eval hands the model's arguments to every task as metadata; this reads from them what the model class reads.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from intactkv_eval.assemble.load_errors import check_folder
from intactkv_eval.assemble.tokenizer_check import check_tokenizer
from intactkv_eval.cell.config_files import load_config
from intactkv_eval.errors import DataError
from intactkv_eval.pivot.tokens import use_chat_template

_KEYS = ("revision", "trust_remote_code", "gguf_file", "subfolder")


def tokenizer_of(metadata: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer that `pretrained`, `tokenizer` or `config` among the metadata names.

    Raises DataError where none is named: simple_evaluate with a model object needs metadata={"tokenizer": ...}.
    """
    given = {key: value for key, value in metadata.items() if value is not None}
    if "config" in given:
        given = {**load_config(str(given["config"])), **given}
    named = given.get("tokenizer") or given.get("pretrained")
    if isinstance(named, PreTrainedTokenizerBase):
        return named
    if not isinstance(named, str):
        raise DataError(
            "this task is defined in tokens and is not told the model: pass model_args with pretrained=..., or "
            'metadata={"tokenizer": <folder, hub id or tokenizer>}'
        )
    options = {"trust_remote_code": False, **{key: given[key] for key in _KEYS if key in given}}
    if given.get("tokenizer"):
        options.pop("gguf_file", None)  # that of `pretrained`, as in hf
    return _load(named, given.get("chat_template"), tuple(sorted(options.items())))


@lru_cache(maxsize=2)
def _load(name: str, chat_template: str | None, options: tuple[tuple[str, Any], ...]) -> PreTrainedTokenizerBase:
    check_folder(name)
    check_tokenizer(name, str(dict(options).get("revision") or "main"))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **dict(options))
    if chat_template:
        use_chat_template(tokenizer, chat_template)
    return tokenizer
