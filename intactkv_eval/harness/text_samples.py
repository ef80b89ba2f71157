"""Samples of a text file on this machine, for calibration: random pieces of its tokens."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import DataError


def text_samples(path: Path, tokenizer: Any, count: int, length: int, seed: int) -> list[Tensor]:
    """`count` pieces [length] of the token ids of a .txt, or of the `text` of a .jsonl's lines; no special tokens.

    Raises DataError for a file that cannot be read, is of another kind, or is shorter than one piece.
    """
    ids = torch.tensor(tokenizer(_text(path), add_special_tokens=False)["input_ids"], dtype=torch.long)
    if len(ids) < length:
        raise DataError(f"--data {path}: holds {len(ids)} tokens, one sample takes {length}; name a longer text")
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (count,), generator=draw)
    return [ids[start : start + length] for start in starts.tolist()]


def _text(path: Path) -> str:
    if path.suffix not in {".txt", ".jsonl"}:
        raise DataError(f"--data {path}: use a .txt, or a .jsonl whose lines have a key 'text'")
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return content
        return "\n\n".join(str(json.loads(line)["text"]) for line in content.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {path}: cannot be read ({error})") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f"--data {path}: a line is no JSON object with a key 'text' ({error})") from None
