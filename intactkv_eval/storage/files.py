"""Files: where the shipped folders lie, and writing that is never seen half done.

Knows paths and bytes only.
"""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.limits import (
    DOCUMENT_BYTES,
    LINES_BYTES,
    LINES_VALUES,
    TEXT_BYTES,
    human_size,
    opened,
    read_bytes,
)

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_folder(name: str) -> Path:
    """The folder `tasks`, `model_configs`, `sweeps` or `results/published`: the checkout's own, else the wheel's copy.

    Raises ConfigError where neither exists (a damaged install).
    """
    checkout = _PACKAGE.parent
    candidates = [checkout / name] if (checkout / "pyproject.toml").is_file() else []
    candidates.append(_PACKAGE / Path(name).name)
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise ConfigError(f"the shipped folder {name!r} is missing from this install of intactkv-eval: reinstall it")


def cache_folder() -> Path:
    """Where captured pivots are kept: $INTACTKV_CACHE, else ~/.cache/intactkv."""
    return Path(os.environ.get("INTACTKV_CACHE") or Path.home() / ".cache" / "intactkv")


def check_writable(folder: Path) -> None:
    """Raise ConfigError where nothing can be written in `folder`, or where it cannot be made. Leaves nothing behind."""
    try:
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it into place.

    A reader, or a second writer, sees the old file or the whole new one. It may be read by whom the process's umask
    lets read it: tempfile, and safetensors, let nobody else. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    mode = partial.stat().st_mode
    try:
        write(partial)
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
    except OSError as error:  # a full disk does not say which file it means
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def place_folder(folder: Path, target: Path) -> None:
    """The finished `folder` becomes `target`, which is free: its files are on disk first, then by one rename."""
    for file in folder.rglob("*"):
        if file.is_file():
            flush(file)
    os.replace(folder, target)
    flush(target.parent)


def remove_folder(folder: Path) -> None:
    """Take a folder away at once, its lock too: who comes then makes it anew, and meets no half of it."""
    gone = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with suppress(FileNotFoundError):
        folder.replace(gone)
    shutil.rmtree(gone)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """While it lasts, no other process of this machine holds `path`; False where one does and there is no waiting.

    The lock ends with its process, however that ends. Raises OSError as the file system does.
    """
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_at(file, path):
                yield True
                return


def _opened(path: Path) -> IO[str]:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("w")
        except FileNotFoundError:  # the folder was removed between the two
            continue
        except FileExistsError:  # or while mkdir looked what was there
            if path.parent.exists() and not path.parent.is_dir():
                raise


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the file that was opened is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError where it is not UTF-8, no regular file, or very large; OSError otherwise."""
    try:
        return read_bytes(path, TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error})") from None
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. Raises DataError that names the line where one is damaged, or the file too large.

    Lines end at newlines alone: a text may hold other characters that `splitlines` takes for ends.
    """
    rows: list[dict[str, Any]] = []
    parts = 0
    for number, line in enumerate(_lines(path), start=1):
        parts += line.count(b",") + line.count(b"[") + line.count(b"{")
        if parts > LINES_VALUES:
            raise DataError(f"{path}, line {number}: the file holds more than {LINES_VALUES:,} values")
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {number}: not UTF-8 ({error})") from None
        if not text.strip():
            continue
        try:
            row = parse_json(text)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected an object, found {type(row).__name__}")
        rows.append(row)
    return rows


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a stranger's file, one at a time. Raises DataError for one that is too long, or no regular file."""
    try:
        with opened(path, LINES_BYTES) as file:
            while line := file.readline(DOCUMENT_BYTES + 1):
                if len(line) > DOCUMENT_BYTES:
                    raise ValueError(f"a line of more than {human_size(DOCUMENT_BYTES)}")
                yield line
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A whole JSONL file, written as `write_atomic` does."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
