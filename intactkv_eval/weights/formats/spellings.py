"""Other spellings of what a foreign config says: keys, words and act-order, as the libraries that wrote them read them.

Knows no format. Sources: GPTQModel 7.7 and AutoGPTQ 0.7.1 (quantization/config.py), transformers' GPTQConfig,
compressed-tensors 0.8 to 0.20 (quantization/quant_args.py).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from intactkv_eval.errors import CheckpointError

GroupOrder: TypeAlias = Literal["group", "weight"] | None
"""Columns are quantized by activation, and the groups are of neighbours in that order (`group`) or in the matrix
(`weight`, static groups); None without act-order."""

_ORDERS: dict[str, GroupOrder] = {
    "group": "group",
    "dynamic": "group",
    "true": "group",
    "weight": "weight",
    "static": "weight",
    "false": None,
    "none": None,
}


def name_of(value: object) -> str:
    """A name as a config may spell it, in small letters and without the class of an enumeration: `FORMAT.GPTQ_V2`."""
    return str(getattr(value, "value", value)).strip().lower().rpartition(".")[2]


def word(value: object) -> str:
    """The same with underscores for hyphens, which some write."""
    return name_of(value).replace("-", "_")


def one_of(
    config: Mapping[str, Any], keys: Sequence[str], meaning: Callable[[Any], Any] = lambda value: value
) -> Any | None:
    """What `config` says under any of `keys`, None where it says nothing or null.

    Args:
        config: The keys and values of a config.
        keys: The spellings of one setting.
        meaning: What a value means; two spellings agree where they mean the same.

    Raises:
        CheckpointError: Two of the keys contradict each other.
    """
    said = {key: config[key] for key in keys if config.get(key) is not None}
    if not said:
        return None
    (first, value), *others = said.items()
    for key, other in others:
        if meaning(other) != meaning(value):
            raise CheckpointError(
                f"quantization_config: {first} is {value!r:.80} and {key} is {other!r:.80}, which are two spellings of "
                "one setting: remove the wrong one (the weights would be read otherwise)"
            )
    return meaning(value)


def group_order(value: object) -> GroupOrder:
    """What a config says of act-order: true or false, or compressed-tensors' words and their aliases.

    Raises CheckpointError for another word.
    """
    if value is not None and word(value) not in _ORDERS:
        raise CheckpointError(
            f"quantization_config: act-order is {value!r:.80}; expected true, false, or one of group, weight, dynamic, "
            "static"
        )
    return _ORDERS[word(value)]


def whole_number(value: object) -> object:
    """A number that a config may hold as text ("4") or as 4.0; anything else as it is."""
    if isinstance(value, str) and re.fullmatch("-?[0-9]{1,9}", value.strip()):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value
