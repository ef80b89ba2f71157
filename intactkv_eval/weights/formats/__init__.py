"""Checkpoint formats, one file each. A foreign format dies here: what leaves is QuantizedWeight."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from intactkv_eval.weights.formats import awq, compressed_tensors, gptq, intactkv
from intactkv_eval.weights.formats.layer import LayerTensors
from intactkv_eval.weights.formats.scheme import Scheme
from intactkv_eval.weights.input_transform import Rotation, StageSpec
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
        """What a run records of it: method, bits, group_size, symmetric, act_order, mixed, and perhaps static_groups.

        act_order: whether the columns were quantized by activation, as the config says. static_groups: true where the
        groups are of neighbours in the matrix all the same.
        """
        ...

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The weight of one layer."""
        ...


class Layout(NamedTuple):
    """reads: what reads a checkpoint, by its config. describe, encode: what writes its config and a layer's tensors."""

    reads: Callable[[Mapping[str, Any]], Format]
    describe: Callable[[Scheme], dict[str, Any]]
    encode: Callable[[QuantizedWeight, Scheme], dict[str, Tensor]]


_CT = compressed_tensors
FORMATS: dict[str, Layout] = {
    gptq.NAME: Layout(gptq.read_config, gptq.describe, gptq.encode),
    awq.NAME: Layout(awq.read_config, awq.describe, awq.encode),
    _CT.NAME: Layout(_CT.read_config, _CT.describe, _CT.encode),
    intactkv.NAME: Layout(intactkv.IntactKVFormat, intactkv.describe, intactkv.encode),
}


NAMES = {"sparseml": _CT.NAME, "compressed_tensors": _CT.NAME}
"""Other names of methods: compressed-tensors' own before 06/2024, and one without a hyphen."""


def format_of(quantization: Mapping[str, Any] | None) -> Format | None:
    """The format that a config's `quantization_config` describes; None where it is none that is read natively.

    Raises CheckpointError for a variant of a known format that is not read.
    """
    found = FORMATS.get(str((quantization or {}).get("quant_method", "")).lower())
    return found.reads(quantization or {}) if found else None


def stage_of(layout: Format, layer: LayerTensors) -> StageSpec:
    """What a checkpoint says of the input of one layer: an idle stage in every format but our own."""
    return layout.stage(layer) if isinstance(layout, intactkv.IntactKVFormat) else StageSpec()


def rotation_of(layout: Format | None) -> Rotation | None:
    """How the checkpoint's model was rotated, None where it was not."""
    return layout.rotation if isinstance(layout, intactkv.IntactKVFormat) else None
