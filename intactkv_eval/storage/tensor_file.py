"""Our own files of tensors: of a safetensors all tensors, with its metadata. Knows no format."""

import io
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.sanitize import struck
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.limits import check_regular

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_OS_ERROR = re.compile(r"os error (\d+)")


def read_tensor_file(path: Path, floats: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors, by name. floats: all must be numbers of 16, 32 or 64 bits.

    Raises CheckpointError, with the reason alone, where it cannot be read.
    """
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    for name, tensor in tensors.items():
        if floats and tensor.dtype not in _FLOATS:
            raise CheckpointError(f"{name} is of {tensor.dtype}, expected floating point of 16, 32 or 64 bits")
    return metadata, tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata alone. Raises CheckpointError, with the reason alone, where it cannot be read."""
    try:
        check_regular(path)
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """safetensors' `save_file`, whose errors are the file system's. Raises OSError."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        found = _OS_ERROR.search(str(error))
        if found is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number), str(path)) from None


def write_pickle(path: Path, content: object) -> None:
    """torch.save, whole or not at all. Raises OSError: torch itself fails otherwise where a disk is full."""
    whole = io.BytesIO()
    torch.save(content, whole)
    write_atomic(path, lambda partial: partial.write_bytes(whole.getbuffer()))


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a small file, whole or not at all; the same content is the same bytes. Raises OSError.

    safetensors itself writes metadata in an order that changes from process to process.
    """
    said = {name: struck(text) for name, text in metadata.items()}
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, said)
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    content = len(header).to_bytes(8, "little") + header + data[8 + size :]
    write_atomic(path, lambda partial: partial.write_bytes(content))
