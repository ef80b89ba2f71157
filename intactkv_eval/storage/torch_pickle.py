"""Files of `torch.save`, read without torch's own reader: plain values, and tensors that are as large as they say.

The file is a zip archive of a pickle and of one part for each storage. Nothing in it may be compressed, so that it
holds no more than its size; a storage must have the size that the pickle says, and a tensor as many numbers as its
storage. The pickle is read by plain_pickle.py.
Source of the layout: torch/serialization.py (_save, _load), torch/_utils.py (_rebuild_tensor_v2).
"""

import pickle
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.storage.documents import BROKEN_PICKLE
from intactkv_eval.storage.limits import PICKLE_BYTES, TENSORS_TIMES, TORCH_LIST
from intactkv_eval.storage.plain_pickle import read_plain
from intactkv_eval.storage.zip_file import BROKEN_ZIP, opened_zip

_TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
_BROKEN = (*BROKEN_PICKLE, *BROKEN_ZIP)


class _Storage(NamedTuple):
    dtype: torch.dtype
    numbers: Tensor


def read_torch_file(path: Path) -> Any:
    """The value that `torch.save` wrote, on the CPU: texts, numbers, lists, tuples, mappings and tensors.

    Raises CheckpointError, with the reason alone, for what is damaged, compressed, larger than its file, or more than
    plain values and tensors: a pickle that names a class or a function is never run.
    """
    try:
        size = path.stat().st_size
        with opened_zip(path, size, TORCH_LIST) as archive:
            return _Reader(archive, size).value()
    except zipfile.BadZipFile:
        raise CheckpointError("no whole zip archive, as torch.save has written since torch 1.6") from None
    except _BROKEN as error:
        raise CheckpointError(f"{type(error).__name__}: {str(error)[:300]}") from None


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._left = archive, TENSORS_TIMES * size
        self._parts = {info.filename: info for info in archive.infolist()}
        self._storages: dict[str, _Storage] = {}
        if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size
               for info in archive.infolist()):  # fmt: skip
            raise pickle.UnpicklingError("a part is compressed, which torch.save never does")
        if sum(info.file_size for info in archive.infolist()) > size:
            raise pickle.UnpicklingError("its parts are larger than the file")
        roots = [name.removesuffix("data.pkl") for name in self._parts if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise pickle.UnpicklingError("expected one data.pkl, as torch.save writes it")
        self._root = roots[0]

    def value(self) -> Any:
        if self._parts[f"{self._root}data.pkl"].file_size > PICKLE_BYTES:
            raise pickle.UnpicklingError(f"its data.pkl is larger than {PICKLE_BYTES >> 20} MiB")
        order = f"{self._root}byteorder"
        if order in self._parts and self._parts[order].file_size != len("little"):
            raise pickle.UnpicklingError("its numbers are not little-endian")
        calls = {
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            "collections.OrderedDict": dict,
            "torch.Size": _sizes,
            **dict.fromkeys((f"torch.{name}Storage" for name in _TYPES), None),
        }
        return read_plain(self._archive.read(f"{self._root}data.pkl"), calls, self._storage)

    def _storage(self, named: Any) -> _Storage:
        """("storage", its class, key, device, numbers)."""
        _, kind, key, _, count = named
        dtype = _TYPES[str(kind).removeprefix("torch.").removesuffix("Storage")]
        if key not in self._storages:
            name = f"{self._root}data/{key}"
            if self._parts[name].file_size != count * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} is not of the {count} numbers that it should have")
            content = bytearray(self._archive.read(name))
            numbers = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            self._storages[key] = _Storage(dtype, numbers)
        if self._storages[key].dtype != dtype:
            raise pickle.UnpicklingError(f"storage {key} is of two types")
        return self._storages[key]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
        if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 16:
            raise pickle.UnpicklingError("a tensor of no storage, or without a stride for each dimension")
        if not all(isinstance(one, int) and one >= 0 for one in (offset, *size, *stride)):
            raise pickle.UnpicklingError(f"a tensor of size {size!s:.80} and strides {stride!s:.80}")
        count, held = prod(size), storage.numbers.numel()
        end = offset + sum((one - 1) * step for one, step in zip(size, stride, strict=True)) + 1
        if count and (count > held or end > held):
            raise pickle.UnpicklingError(f"a tensor {tuple(size)!s:.80} of a storage that holds {held} numbers")
        self._left -= count * storage.dtype.itemsize
        if self._left < 0:
            raise pickle.UnpicklingError(f"its tensors are more than {TENSORS_TIMES} times as large as the file")
        return storage.numbers.as_strided(size, stride, offset) if count else storage.numbers.new_empty(size)


def _sizes(given: Any = ()) -> tuple[Any, ...]:
    return tuple(given)
