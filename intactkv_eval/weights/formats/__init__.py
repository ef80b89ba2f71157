"""Checkpoint formats, one file each. A foreign format dies here: what leaves is QuantizedWeight."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from intactkv_eval.weights.formats import awq, compressed_tensors, gptq
from intactkv_eval.weights.formats.layer import LayerTensors
from intactkv_eval.weights.formats.scheme import Scheme
from intactkv_eval.weights.quantized import QuantizedWeight


class Format(Protocol):
    """A format as one checkpoint's config describes it.

    tensors: the names of a packed layer's tensors. main: the one that every packed layer has.
    """

    @property
    def tensors(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def main(self) -> str: ...  # noqa: D102

    def summary(self) -> dict[str, Any]:
        """What a run records of it: method, bits, group_size, symmetric, act_order, mixed."""
        ...

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The weight of one layer."""
        ...


class Writer(NamedTuple):
    """describe: the `quantization_config`. encode: the tensors of one layer, by their names in the format."""

    describe: Callable[[Scheme], dict[str, Any]]
    encode: Callable[[QuantizedWeight, Scheme], dict[str, Tensor]]


FORMATS: dict[str, Callable[[Mapping[str, Any]], Format]] = {
    gptq.NAME: gptq.GPTQFormat,
    awq.NAME: awq.AWQFormat,
    compressed_tensors.NAME: compressed_tensors.CompressedTensorsFormat,
}

# What writes each: the config, and one layer's tensors.
WRITERS: dict[str, Writer] = {
    gptq.NAME: Writer(gptq.describe, gptq.encode),
    awq.NAME: Writer(awq.describe, awq.encode),
    compressed_tensors.NAME: Writer(compressed_tensors.describe, compressed_tensors.encode),
}


def format_of(quantization: Mapping[str, Any] | None) -> Format | None:
    """The format that a config's `quantization_config` describes; None where it is none that is read natively.

    Raises CheckpointError for a variant of a known format that is not read.
    """
    method = str((quantization or {}).get("quant_method", "")).lower()
    made = FORMATS.get(method)
    return made(quantization or {}) if made else None
