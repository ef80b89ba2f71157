"""The numbers of figures (figures.npz), read without numpy's own reader: plain numbers, as large as their file says.

numpy would unpack whatever the archive holds, and makes room for any shape that a header claims. Here the header of
each array is compared with the size of its part first, all together are bound, and an array of objects is refused.
"""

import hashlib
import re
import zipfile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from intactkv_eval.storage.limits import FIGURES_BYTES, FIGURES_LIST, human_size, read_bytes
from intactkv_eval.storage.zip_file import BROKEN_ZIP, opened_zip

_START = re.compile(rb"\x93NUMPY[\x01\x02]\x00")
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[fiub](?:1|2|4|8))', 'fortran_order': (True|False), 'shape': \(([0-9, ]{0,80})\),? *\} *\n"
)


def read_numbers(path: Path) -> tuple[dict[str, NDArray[Any]], str]:
    """The arrays by name, and the SHA-256 of the file.

    Raises ValueError for what is damaged, too large or no numbers; OSError otherwise.
    """
    try:
        with opened_zip(path, FIGURES_BYTES, FIGURES_LIST) as archive:
            parts = archive.infolist()
            total = sum(part.file_size for part in parts)
            if total > FIGURES_BYTES:
                raise ValueError(f"has {total:,} bytes, unpacked; expected at most {human_size(FIGURES_BYTES)}")
            numbers = {part.filename.removesuffix(".npy"): _array(archive, part) for part in parts}
        return numbers, hashlib.sha256(read_bytes(path, FIGURES_BYTES)).hexdigest()
    except BROKEN_ZIP as error:
        raise ValueError(f"{path.name}: no whole archive of arrays ({str(error)[:200]})") from None
    except ValueError as error:
        raise ValueError(f"{path.name} {str(error)[:300]}") from None


def _array(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(part) as file:
        shape, columns, dtype = _described(file, part.filename)
        left, count = part.file_size - file.tell(), prod(shape)
        if count * dtype.itemsize != left:
            raise ValueError(
                f"says that {part.filename[:80]!r} is of shape {str(shape)[:80]} and type {dtype.str}, which are not "
                f"its {left:,} bytes"
            )
        numbers = np.frombuffer(file.read(left), dtype)
        return numbers.reshape(shape, order="F" if columns else "C")


def _described(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether columns lie together, and type, as the header of an array says.

    Source of the layout: numpy/lib/_format_impl.py (versions 1.0 and 2.0).
    """
    start = file.read(8)
    length = int.from_bytes(file.read(2 if start[6:7] == b"\x01" else 4), "little")
    found = _HEADER.fullmatch(file.read(min(length, 1000)))
    if not _START.fullmatch(start) or found is None:
        raise ValueError(f"has {name[:80]!r}, which is no array of plain numbers as numpy saves it")
    shape = tuple(int(size) for size in found[3].decode().replace(" ", "").split(",") if size)
    return shape, found[2] == b"True", np.dtype(found[1].decode())
