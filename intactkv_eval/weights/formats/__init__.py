"""Checkpoint formats: each module converts one format to QuantizedWeight; no other code knows the format."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from intactkv_eval.weights.formats import awq, compressed_tensors, gptq, intactkv
from intactkv_eval.weights.formats.format import Format
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.quantized import QuantizedWeight

__all__ = ["FORMATS", "NAMES", "Format", "FormatEntry", "format_of"]


class FormatEntry(NamedTuple):
    """reads: what reads a checkpoint, by its config. describe, encode: what writes its config and a layer's tensors."""

    reads: Callable[[Mapping[str, Any]], Format]
    describe: Callable[[CheckpointScheme], dict[str, Any]]
    encode: Callable[[QuantizedWeight, CheckpointScheme], dict[str, Tensor]]


_CT = compressed_tensors
FORMATS: dict[str, FormatEntry] = {
    gptq.NAME: FormatEntry(gptq.read_config, gptq.describe, gptq.encode),
    awq.NAME: FormatEntry(awq.read_config, awq.describe, awq.encode),
    _CT.NAME: FormatEntry(_CT.read_config, _CT.describe, _CT.encode),
    intactkv.NAME: FormatEntry(intactkv.IntactKVFormat, intactkv.describe, intactkv.encode),
}


NAMES = {"sparseml": _CT.NAME, "compressed_tensors": _CT.NAME}
"""Other names of methods: compressed-tensors' own before 06/2024, and one without a hyphen."""


def format_of(quantization: Mapping[str, Any] | None) -> Format | None:
    """The format that a config's `quantization_config` describes; None where it is none that is read natively.

    Raises CheckpointError for a variant of a known format that is not read.
    """
    found = FORMATS.get(str((quantization or {}).get("quant_method", "")).lower())
    return found.reads(quantization or {}) if found else None
