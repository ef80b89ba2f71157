"""Calibration samples: windows of tokens from a public text or a file, the same ones for the same seed.

    wikitext2   train lines joined by two newlines, windows drawn from the whole (GPTQ's and OmniQuant's way)
    c4          the first train file: documents drawn at random, those longer than a window, a window of each (GPTQ's)
    pile        pile-val shuffled, documents up to 512 tokens joined and cut into windows (AWQ's)
    FILE        .txt, or .jsonl with the field `text`: joined by two newlines, windows drawn from the whole

No BOS and no other special token is put in. What was drawn is told by a hash over the tokens.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.data.hub import digest_of, load_dataset, mirror, origin
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.storage.files import read_jsonl, read_text

SOURCES = ("wikitext2", "c4", "pile")
_C4_FILE = "en/c4-train.00000-of-01024.json.gz"
_LONGEST_OF_PILE = 512  # tokens; AWQ leaves longer documents out
_CHARACTERS = 24  # a token is shorter than that, so that a short document need not be tokenized to be left out


@dataclass(frozen=True, eq=False)
class Samples:
    """tokens: windows [T] (int64). source, seed: where they came from; digest: SHA-256 over all of them."""

    tokens: list[Tensor]
    source: str
    seed: int
    digest: str

    def record(self) -> dict[str, Any]:
        """What a checkpoint tells of them."""
        length = max(len(window) for window in self.tokens)
        return {"source": self.source, "samples": len(self.tokens), "length": length, "seed": self.seed,
                "sha256": self.digest}  # fmt: skip


def load_samples(source: str, tokenizer: Any, count: int, length: int, seed: int = 0) -> Samples:
    """`count` windows of `length` tokens.

    Raises ConfigError for an unknown source, DataError for too little text.
    """
    if count < 1 or length < 2:
        raise ConfigError(f"calibration: {count} samples of {length} tokens; use at least 1 of 2")
    draw = random.Random(seed)
    if source == "c4":
        windows = _of_long_documents(_c4(), tokenizer, count, length, draw)
    elif source == "pile":
        windows = _cut(_pile(seed), tokenizer, count, length)
    elif source == "wikitext2":
        rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="train")
        windows = _drawn("\n\n".join(rows["text"]), source, tokenizer, count, length, draw)
    else:
        windows = _drawn(_text_of(Path(source)), source, tokenizer, count, length, draw)
    tokens = [torch.tensor(window, dtype=torch.long) for window in windows]
    digest = digest_of(window.numpy() for window in tokens)
    known = f"{source} ({origin()})" if source in SOURCES else Path(source).name
    return Samples(tokens, known, seed, digest)


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def _drawn(text: str, source: str, tokenizer: Any, count: int, length: int, draw: random.Random) -> list[list[int]]:
    ids = _encode(tokenizer, text)
    if len(ids) < length:
        raise DataError(f"calibration text {source}: {len(ids)} tokens, but one window has {length}")
    starts = [draw.randint(0, len(ids) - length) for _ in range(count)]
    return [ids[start : start + length] for start in starts]


def _of_long_documents(texts: Any, tokenizer: Any, count: int, length: int, draw: random.Random) -> list[list[int]]:
    """Documents drawn once each: GPTQ's own loop may take one twice, and never ends where none is long enough."""
    order = list(range(len(texts)))
    draw.shuffle(order)
    windows: list[list[int]] = []
    for place in order:
        text = texts[place]
        ids = _encode(tokenizer, text) if len(text) > length else []
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
        if len(windows) == count:
            return windows
    raise DataError(
        f"calibration on c4: {len(windows)} of {len(texts)} documents have more than {length} tokens, {count} are "
        "needed; use fewer samples, a shorter --length or another --data"
    )


def _cut(texts: Any, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    joined: list[int] = []
    for text in map(str.strip, texts):
        ids = _encode(tokenizer, text) if len(text) < _LONGEST_OF_PILE * _CHARACTERS else []
        joined += ids if len(ids) <= _LONGEST_OF_PILE else []
        if len(joined) >= count * length:
            return [joined[start : start + length] for start in range(0, count * length, length)]
    raise DataError(f"calibration on pile: {len(joined)} tokens in documents of up to {_LONGEST_OF_PILE}, "
                    f"{count * length} are needed")  # fmt: skip


def _c4() -> Any:
    root = mirror()
    if root and not (root / "allenai/c4" / _C4_FILE).is_file():
        return load_dataset("allenai/c4", "en", split="train")["text"]
    return load_dataset("allenai/c4", data_files={"train": _C4_FILE}, split="train")["text"]


def _pile(seed: int) -> Any:
    return load_dataset("mit-han-lab/pile-val-backup", split="validation").shuffle(seed=seed)["text"]


def _text_of(path: Path) -> str:
    """The text of a file. Raises ConfigError where the source is neither a known name nor a file."""
    if path.suffix not in {".txt", ".jsonl"} or not path.is_file():
        raise ConfigError(f"calibration data {str(path)!r}: use {', '.join(SOURCES)}, or a .txt or .jsonl file")
    if path.suffix == ".txt":
        return read_text(path)
    rows = read_jsonl(path)
    bad = next((number for number, row in enumerate(rows, 1) if not isinstance(row.get("text"), str)), None)
    if bad is not None:
        raise DataError(f"{path}, line {bad}: expected an object with the field 'text'")
    return "\n\n".join(row["text"] for row in rows)
