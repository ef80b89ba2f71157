"""Zip archives from strangers, opened with a list of parts that is bound: zipfile makes an object of each entry.

An entry takes 46 bytes of the file and ten times that in memory, so the list is bound before it is read.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from intactkv_eval.storage.limits import human_size, opened

BROKEN_ZIP = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
"""What zipfile raises for a damaged, encrypted or unusual archive, beside ValueError and OSError."""


@contextmanager
def opened_zip(path: Path, most: int, most_list: int) -> Iterator[zipfile.ZipFile]:
    """The archive, open for reading.

    most: bytes of the file. most_list: bytes of the list of its parts. Raises ValueError for what is larger, no regular
    file, or holds two parts of one name; BROKEN_ZIP or OSError for what is no whole archive.
    """
    with opened(path, most) as file:
        bound = _Bound(file, most_list)
        with zipfile.ZipFile(bound) as archive:  # type: ignore[call-overload]
            bound.most = most
            if len({info.filename for info in archive.infolist()}) != len(archive.infolist()):
                raise ValueError("has two parts of one name")
            yield archive


class _Bound:
    """A file of which no single read takes more than `most` bytes: zipfile reads the list of parts in one."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self.most = file, most
        self.seek, self.tell, self.seekable, self.close = file.seek, file.tell, file.seekable, file.close

    def read(self, count: int = -1) -> bytes:
        if count > self.most:
            raise ValueError(f"has a list of parts of {count:,} bytes; expected at most {human_size(self.most)}")
        content = self._file.read(self.most + 1 if count < 0 else count)
        if len(content) > self.most:
            raise ValueError(f"has more than {human_size(self.most)} behind its list of parts")
        return content
