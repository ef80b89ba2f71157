"""Format: one checkpoint format as a checkpoint's config describes it. Knows no format."""

from abc import ABC, abstractmethod
from typing import Any

from intactkv_eval.weights.formats.layer import LayerTensors
from intactkv_eval.weights.input_transform import InputTransform, Rotation
from intactkv_eval.weights.quantized import QuantizedWeight


class Format(ABC):
    """What a format answers for itself; what most formats do not have has an idle default.

    tensors: the names of a packed layer's tensors. main: the one that every packed layer has.
    """

    tensors: tuple[str, ...]
    main: str

    @abstractmethod
    def summary(self) -> dict[str, Any]:
        """What a run records of it: method, bits, group_size, symmetric, act_order, mixed, and perhaps static_groups.

        act_order: whether the columns were quantized by activation, as the config says. static_groups: true where the
        groups are of neighbours in the matrix all the same.
        """

    @abstractmethod
    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The weight of one layer."""

    def stage(self, layer: LayerTensors) -> InputTransform:
        """What the checkpoint says of the input of one layer."""
        return InputTransform()

    @property
    def rotation(self) -> Rotation | None:
        """How the checkpoint's model was rotated, None where it was not."""
        return None
