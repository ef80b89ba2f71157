"""Our own safetensors files: all tensors of one, with its metadata. Knows no format."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from intactkv_eval.errors import CheckpointError


def read_tensor_file(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, by name. Raises CheckpointError, with the reason alone, where it cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(str(error)) from None
