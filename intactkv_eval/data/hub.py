"""Public data sets: from the hub, or from a local mirror of it in the folder that INTACTKV_DATA names.

The mirror has the hub's layout: ROOT/<org>/<name>/ as a repository lies there. Knows data sets, no models.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from numpy.typing import NDArray

from intactkv_eval.errors import DataError
from intactkv_eval.storage.files import cache_folder

ENV = "INTACTKV_DATA"


def mirror() -> Path | None:
    """The local mirror, or None for the hub. Raises DataError where INTACTKV_DATA names no folder."""
    named = os.environ.get(ENV)
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise DataError(f"{ENV}={named}: no such folder; it should hold <org>/<name>/ as on the hub")
    return folder


def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset` of a hub repository, or of its copy in the mirror.

    Raises DataError where it cannot be had, naming the place that was tried.
    """
    root = mirror()
    place = str(root / path) if root else path
    if root and not (root / path).is_dir():
        raise DataError(f"{ENV}={root}: holds no folder {path}; copy that hub repository there, or unset {ENV}")
    if root:
        options.pop("revision", None)
        options["cache_dir"] = str(_cache_of(root / path))
    try:
        return datasets.load_dataset(place, name, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        where = "the mirror" if root else f"the hub (for a local copy set {ENV})"
        raise DataError(f"data set {path} {name or ''} cannot be loaded from {where}: {error}") from error


def _cache_of(folder: Path) -> Path:
    """A cache for these very files: that of `datasets` takes two folders with one name and card for the same data."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listed = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return cache_folder() / "datasets" / hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def digest_of(windows: Iterable[NDArray[Any]]) -> str:
    """SHA-256 over windows of token ids: the name of a set of samples, wherever it is recorded."""
    made = hashlib.sha256()
    for window in windows:
        made.update(f"{len(window)} ".encode() + window.astype("<i4").tobytes())
    return made.hexdigest()


def digest_of_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def origin() -> str:
    """Where data comes from now, for the record of a run: figures of a hub and of a mirror are not paired."""
    return "local mirror" if mirror() else "hub"
