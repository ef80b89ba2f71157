"""Files: where the shipped folders lie, and writing that is never seen half done.

Knows paths and bytes only.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from intactkv_eval.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """The folder `tasks`, `model_configs` or `results/published`: the checkout's own, else the wheel's copy.

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


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it into place.

    A reader, or a second writer, sees the old file or the whole new one. Raises OSError as the file system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
