"""Our own format, for what no other says: layers whose inputs are transformed or quantized (QuaRot, W8A8, ...).

    the packed layers     as gptq_v2 writes them: qweight, qzeros, scales (in their own dtype), g_idx
    input_range [2]       fp32, beside a layer: the lowest and highest number of its input, for static quantizers
    config.json           quantization_config: bits, group_size, symmetric; activations: an ActivationSpec;
                          rotation: {seed, head_dim, online: {layer: width of blocks}, digests: {order: SHA-256}}

Its name is no other library's, so that none loads a checkpoint and computes without its stages.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from intactkv_eval.cell.spec import ActivationSpec
from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.formats import gptq
from intactkv_eval.weights.formats.format import Format
from intactkv_eval.weights.formats.layer import LayerTensors
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.hadamard import block_digest, has_hadamard
from intactkv_eval.weights.input_transform import InputTransform, Range, Rotation
from intactkv_eval.weights.quantized import QuantizedWeight

NAME = "intactkv"
RANGE = "input_range"
_VERSION = 1


def describe(scheme: CheckpointScheme) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that `encode` wrote."""
    return {
        "quant_method": NAME,
        "version": _VERSION,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "symmetric": scheme.symmetric,
        "activations": scheme.activations.model_dump(),
        "rotation": asdict(scheme.rotation) if scheme.rotation else None,
        "meta": scheme.meta,
    }


def encode(weight: QuantizedWeight, scheme: CheckpointScheme) -> dict[str, Tensor]:
    """The tensors of one layer. Raises CheckpointError where GPTQ's layout cannot hold it."""
    return gptq.write(weight, less_one=False)


def range_tensors(ranges: Mapping[str, Range]) -> dict[str, Tensor]:
    """Calibrated ranges as the tensors of a checkpoint, by full name."""
    return {f"{name}.{RANGE}": torch.tensor(ends, dtype=torch.float32) for name, ends in ranges.items()}


@dataclass(frozen=True)
class IntactKVFormat(Format):
    """The format as a checkpoint's config describes it. Raises CheckpointError for a config that it cannot be."""

    config: Mapping[str, Any]
    tensors: tuple[str, ...] = (*gptq.TENSORS, RANGE)
    main: str = "qweight"

    def __post_init__(self) -> None:
        version = self.config.get("version")
        if version != _VERSION:
            raise CheckpointError(f"quantization_config: version {version!r}, this release reads {_VERSION}: update it")
        size = self.config.get("group_size")
        if isinstance(size, bool) or not isinstance(size, int) or (size != -1 and size < 1):
            raise CheckpointError(f"quantization_config: group_size is {size!r}; expected a positive number, or -1")
        self.summary()  # reads all of it
        for order, digest in (self.rotation.digests if self.rotation else {}).items():
            if not re.fullmatch("[0-9]{1,9}", order) or not has_hadamard(int(order)):
                raise CheckpointError(f"quantization_config: rotation.digests: {order!r:.40} is no order of a row")
            if block_digest(int(order)) != digest:
                raise CheckpointError(
                    f"the Hadamard matrix of order {order} is not the one that this checkpoint was rotated with: "
                    "install the release of compressed-tensors that it was made with, or quantize it anew"
                )

    @cached_property
    def _gptq(self) -> gptq.GPTQFormat:
        said = {key: self.config.get(key) for key in ("bits", "group_size")}
        return gptq.GPTQFormat({**said, "sym": self.config.get("symmetric"), "checkpoint_format": "gptq_v2"})

    @cached_property
    def activations(self) -> ActivationSpec:
        """How the inputs of all layers are quantized."""
        try:
            return ActivationSpec.model_validate(self.config.get("activations"))
        except ValidationError as error:
            raise CheckpointError(f"quantization_config: activations cannot be read: {error}") from None

    @cached_property
    def rotation(self) -> Rotation | None:
        """How the model was rotated."""
        said = self.config.get("rotation")
        if said is None:
            return None
        try:
            online = {str(name): int(width) for name, width in said["online"].items()}
            digests = {str(order): str(digest) for order, digest in said["digests"].items()}
            return Rotation(int(said["seed"]), int(said["head_dim"]), online, digests)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise CheckpointError(
                f"quantization_config: rotation cannot be read ({type(error).__name__}: {error}); expected seed, "
                "head_dim, online and digests"
            ) from None

    def summary(self) -> dict[str, Any]:
        """What a run records of it."""
        rotation = self.rotation
        return {
            **self._gptq.summary(),
            "method": NAME,
            "activations": self.activations.model_dump(),
            "rotation": rotation and {"seed": rotation.seed, "online": len(rotation.online)},
        }

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The layer's weight, exactly."""
        return self._gptq.read(layer)

    def stage(self, layer: LayerTensors) -> InputTransform:
        """What happens to the layer's input. Raises CheckpointError where a static range is missing or one too many."""
        across = self.rotation.online.get(layer.name) if self.rotation else None
        static = self.activations.bits < 16 and self.activations.scheme == "tensor"
        if not static:
            if layer.has(RANGE):
                raise layer.error(RANGE, "none, as no activations are quantized by static ranges", "one")
            return InputTransform(across, self.activations)
        ends = layer.scales(RANGE, (2,)).tolist()
        if ends[0] > ends[1]:
            raise layer.error(RANGE, "the lowest number before the highest", ends)
        return InputTransform(across, self.activations, (ends[0], ends[1]))
