"""What a cell's arguments stand for, wherever it lies: files by their content, folders of models by their weights."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

_PLACES = {"pretrained", "reference", "tokenizer", "peft", "delta", "awq_search", "kv_codebook", "pivot",
           "chat_template", "data", "questions"}  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_SETTINGS = ("*.json", "*.model")  # a SentencePiece model is all of a tokenizer that Vicuna ships
_ENDS = 2**20  # bytes that are read of each end of a weight file


def resolved(value: Any, key: str = "") -> Any:
    """`value`, where files and folders that arguments name are replaced by a digest of what is in them."""
    if isinstance(value, Mapping):
        return {str(name): resolved(value[name], str(name)) for name in sorted(value, key=str)}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [resolved(part, key) for part in value]
    if key in _PLACES and isinstance(value, str) and value and os.path.exists(value):  # pathlib raises for long names
        return digest_at(Path(value).resolve())
    return value


def key_of(value: Any) -> str:
    """16 hex digits that two values share only if they are resolved alike."""
    return hashlib.sha256(json.dumps(resolved(value), sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(maxsize=1024)
def digest_at(path: Path) -> str:
    """Of a file's bytes; of a folder its settings and, of each weight file, name, size and both ends."""
    if path.is_file():
        return f"file:{_digest(path, whole=True)}"
    found = hashlib.sha256()
    for pattern in (*_WEIGHTS, *_SETTINGS):
        for file in sorted(path.glob(pattern)):
            found.update(f"{file.name} {file.stat().st_size} {_digest(file, pattern in _SETTINGS)}\n".encode())
    return f"folder:{found.hexdigest()}"


def _digest(path: Path, whole: bool) -> str:
    found = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if whole or size <= 2 * _ENDS:
            while block := file.read(2**24):
                found.update(block)
        else:
            found.update(file.read(_ENDS))
            file.seek(size - _ENDS)
            found.update(file.read(_ENDS))
    return found.hexdigest()
