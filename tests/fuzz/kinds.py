"""What a fuzzed kind of input is: how one is made, and who reads it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass
class Target:
    """make: an input of a random draw. read: reads one; success or an IntactKVError.

    value: a whole document where inputs have a structure; dump: such a one as bytes.
    """

    make: Callable[[Random], bytes]
    read: Callable[[bytes], object]
    value: object = None
    dump: Callable[[object], bytes] = lambda value: json.dumps(value).encode("utf-8", "surrogatepass")


def file_read(folder: Path, name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """A reader of bytes of what reads the file folder/name."""
    path = folder / name

    def reading(data: bytes) -> object:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return read(path)

    return reading
