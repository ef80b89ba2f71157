"""The archive of results that a worker of a cluster sends back, unpacked within the limits of limits.py.

It is looked through before anything is written: a few megabytes of gzip can be gigabytes of zeros, millions of empty
files, or a name of a gigabyte, which Python's tarfile would read whole. Knows no Ray.
Source of the layout: POSIX.1-2001, pax; headers are of 512 bytes, the size at 124, the type at 156.
"""

import errno
import gzip
import re
import tarfile
import tempfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import IO

from intactkv_eval.errors import CheckpointError, DataError
from intactkv_eval.lm.evaluate_task import check_written
from intactkv_eval.storage.limits import ARCHIVE_BYTES, ARCHIVE_FILES, ARCHIVE_HEADER, MIB, human_size
from intactkv_eval.sweep.folder import RECORD

_BROKEN = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, LookupError, ValueError, TypeError, OverflowError,
           RecursionError, CheckpointError)  # fmt: skip
# What the names in an archive can bring about; any other error of the file system, as a full disk, is ours.
_BY_NAMES = {errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_FILES = {tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE}
_OF_FILES = {tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME}  # what stands before a file: its attributes, its long name
_HIDES = re.compile(rb"(^|\n)\d+ (size|GNU\.sparse[^=]*)=")  # another size than in the header


def unpack(results: bytes, folder: Path) -> None:
    """Fill the empty `folder` with what an actor sent. Raises OSError where we cannot write.

    Raises DataError for an archive that is damaged, too large, leads out of the folder, or holds no whole results of a
    run.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as plain:
            _inflate(results, plain)
            _check_members(plain)
            plain.seek(0)
            with tarfile.open(fileobj=plain, mode="r:") as packed:
                packed.extractall(folder, filter=_file_or_folder)
        check_written(folder, {}, samples=True)
        if (folder / RECORD).exists():
            raise ValueError(f"{RECORD} is among them, which is written here")
    except _BROKEN as error:
        raise DataError(str(error)) from None
    except OSError as error:
        if error.errno in _BY_NAMES:
            raise DataError(str(error)) from None
        raise OSError(error.errno, error.strerror, str(folder)) from None  # a full disk says no name


def _inflate(results: bytes, plain: IO[bytes]) -> None:
    """Write what was compressed, to its end, where its checksum is. Raises ValueError where it is too much."""
    left = ARCHIVE_BYTES
    with gzip.GzipFile(fileobj=BytesIO(results)) as packed:
        while piece := packed.read(MIB):
            left -= len(piece)
            if left < 0:
                raise ValueError(f"its {len(results):,} bytes unpack to more than {human_size(ARCHIVE_BYTES)}")
            plain.write(piece)


def _check_members(plain: IO[bytes]) -> None:
    """Raise ValueError for more files than results have, or one whose name or kind they never have."""
    place, count = 0, 0
    while True:
        plain.seek(place)
        header = plain.read(tarfile.BLOCKSIZE)
        if len(header) < tarfile.BLOCKSIZE or not header.strip(b"\0"):
            return
        count += 1
        size, kind = _size(header[124:136]), header[156:157]
        if count > 3 * ARCHIVE_FILES:
            raise ValueError(f"holds more than {ARCHIVE_FILES:,} files")
        if kind not in _FILES | _OF_FILES:
            raise ValueError(f"holds a member of type {kind!r}, which is neither a file nor a folder")
        if kind in _OF_FILES and size > ARCHIVE_HEADER:
            raise ValueError(f"holds a name or attributes of {size:,} bytes; expected {human_size(ARCHIVE_HEADER)}")
        if kind == tarfile.XHDTYPE and _HIDES.search(plain.read(size)):
            raise ValueError("holds a file of another size than its header says")
        place += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))


def _size(field: bytes) -> int:
    if field[0] & 0x80:
        raise ValueError("holds a file of more than 8 GiB")
    return int(field.rstrip(b" \0") or b"0", 8)


def _file_or_folder(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, path)
