"""One layer's tensors as a checkpoint holds them, and the checks that every format makes of them.

Knows no format; every error names the tensor, what was expected and what was found.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.quantized import BITS


class LayerTensors:
    """The tensors of the linear layer `name` [in_features] -> [out_features], by their names in the format.

    stored: what the checkpoint's files call the layer, where that is not its name in the model. kinds: the names of its
    class and of what that is derived from.
    """

    def __init__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        in_features: int,
        out_features: int,
        stored: str | None = None,
        kinds: frozenset[str] = frozenset({"Linear"}),
    ) -> None:
        self.name, self._tensors = name, tensors
        self.in_features, self.out_features = in_features, out_features
        self.names = tuple(dict.fromkeys((stored or name, name)))
        self.kinds = kinds

    def has(self, key: str) -> bool:
        """Whether the checkpoint holds `key` for this layer."""
        return key in self._tensors

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The shape of `key`, or None where the checkpoint does not hold it."""
        return tuple(self._tensors[key].shape) if key in self._tensors else None

    def words(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The packed int32 tensor `key`. Raises CheckpointError for another dtype or shape."""
        return self._get(key, (torch.int32,), shape)

    def scales(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """The scales `key`. Raises CheckpointError for another dtype or shape, NaN, inf."""
        found = self._get(key, (torch.float16, torch.bfloat16, torch.float32), shape)
        if not torch.isfinite(found).all():
            bad = int((~torch.isfinite(found)).sum())
            raise self.error(key, "finite scales", f"{bad} NaN or infinite of {found.numel()}")
        return found

    def integers(self, key: str, shape: tuple[int, ...], below: int) -> Tensor:
        """Whole numbers 0 <= n < below, as int64. Raises CheckpointError for others, or another dtype or shape."""
        found = self._get(key, (torch.int32, torch.int64), shape).to(torch.int64)
        if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < below):
            raise self.error(key, f"numbers from 0 to {below - 1}", f"{int(found.min())} to {int(found.max())}")
        return found

    def signed(self, key: str, shape: tuple[int, ...], bits: int) -> Tensor:
        """The plain int8 tensor `key` of `bits` bits, signed, as int16. Raises CheckpointError for others."""
        found = self._get(key, (torch.int8,), shape).to(torch.int16)
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        if found.numel() and not (int(found.min()) >= low and int(found.max()) <= high):
            raise self.error(key, f"numbers from {low} to {high}", f"{int(found.min())} to {int(found.max())}")
        return found

    def dtype(self, key: str) -> torch.dtype | None:
        """The dtype of `key`, or None where the checkpoint does not hold it."""
        return self._tensors[key].dtype if key in self._tensors else None

    def error(self, key: str, expected: object, found: object) -> CheckpointError:
        """The error to raise about one tensor."""
        return CheckpointError(
            f"{self.name}.{key}: expected {expected}, found {found}. The checkpoint is damaged, or its config is "
            "another's; download or quantize it anew"
        )

    def _get(self, key: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        if key not in self._tensors:
            raise self.error(key, "the tensor", f"only {', '.join(sorted(self._tensors))}")
        found = self._tensors[key]
        if found.dtype not in dtypes:
            raise self.error(key, " or ".join(_name(dtype) for dtype in dtypes), _name(found.dtype))
        if tuple(found.shape) != shape:
            raise self.error(key, f"shape {shape}", tuple(found.shape))
        return found


def check_config_bits(bits: object, source: str) -> int:
    """The bit width that a config says, or CheckpointError where it is none that we read."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in BITS:
        raise CheckpointError(f"{source}: bits is {bits!r}; supported are {', '.join(map(str, BITS))}")
    return bits


def in_group_order(
    layer: LayerTensors, key: str, codes: Tensor, groups: int, group_size: int, required: bool
) -> tuple[Tensor, Tensor | None]:
    """Codes [O, I] with groups contiguous, and the order of their columns: None where they were so (no act-order).

    `key` holds the group of each input [I]. Raises CheckpointError where it is `required` and absent, names a group
    that is none, or a group has not `group_size` inputs (the last may have fewer).
    """
    if not layer.has(key):
        if required:
            raise layer.error(key, "the tensor (the config says act-order)", "none")
        return codes, None
    index = layer.integers(key, (layer.in_features,), groups)
    natural = torch.arange(layer.in_features, device=index.device) // group_size
    if torch.equal(index, natural):
        return codes, None
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], natural):
        counts = torch.bincount(index)
        raise layer.error(key, f"{group_size} inputs in every group", f"{int(counts.min())} to {int(counts.max())}")
    return codes[:, order], order.to(torch.int32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
