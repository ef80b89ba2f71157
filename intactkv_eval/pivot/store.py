"""A folder of captured pivots, so that a full-precision model is not loaded for the same pivot twice.

An entry's name is the hash of what was asked: the identity of the checkpoint's files, dtype and token ids. Files are
written whole or not at all (files.write_atomic), and processes that capture the same pivot write the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from intactkv_eval.compat.transformers_api import cached_file
from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.files import cache_folder

logger = logging.getLogger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")
_SETTINGS = ("*.json", "*.py", "*.model", "*.txt")  # the config, code of the model's own, tokenizers


def source_identity(pretrained: str, revision: str) -> str | None:
    """What tells one checkpoint from another without loading it: a hub commit, or its files.

    Of weights names, sizes and times; of small files, which say what is computed with them, what is in them. None where
    neither is known; then nothing is kept.
    """
    folder = Path(pretrained)
    if folder.is_dir():
        listed = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in _files(folder, _WEIGHT_FILES)]
        settings = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in _files(folder, _SETTINGS)}
        return json.dumps([str(folder.resolve()), listed, settings]) if listed else None
    try:
        config = cached_file(pretrained, "config.json", revision=revision, local_files_only=True)
    except OSError:
        return None
    commit = Path(config).parent.name if config else ""
    return json.dumps([pretrained, commit]) if len(commit) == 40 else None


def entry_path(identity: str, dtype: str, token_ids: tuple[int, ...]) -> Path:
    """Where the PivotKV of these tokens, this checkpoint and this dtype is kept."""
    asked = json.dumps([identity, dtype, list(token_ids)])
    return cache_folder() / "pivots" / f"{hashlib.sha256(asked.encode()).hexdigest()[:32]}.safetensors"


def find(identity: str | None, dtype: str, token_ids: tuple[int, ...]) -> PivotKV | None:
    """The kept PivotKV, or None. A damaged entry is reported and treated as absent."""
    path = entry_path(identity, dtype, token_ids) if identity else None
    if path is None or not path.is_file():
        return None
    try:
        pivot = PivotKV.load(path)
        pivot.check_matches(token_ids=token_ids)
    except PivotError as error:
        logger.warning("the kept pivot %s is not used: %s", path, error)
        return None
    whole = pivot.fingerprint.embedding_sample and pivot.weights
    return pivot if whole else None  # without them: kept by an earlier release


def keep(pivot: PivotKV, identity: str | None, dtype: str) -> None:
    """Keep `pivot`; a folder that cannot be written is reported, not fatal: the run has its pivot already."""
    if identity is None:
        return
    path = entry_path(identity, dtype, pivot.token_ids)
    try:
        pivot.save(path)
    except OSError as error:
        logger.warning("the pivot is not kept for later runs: %s cannot be written (%s)", path, error)


def _files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file())
