"""Where the files of the benches come from: a folder, the local mirror, or the published ones.

Published are those of FastChat's repository at one commit, and from IntactKV's the reference answers of
gpt-4-0125-preview; every byte is checked. The hub has MT-Bench's questions in a Space, but neither the judge's prompts
nor Vicuna's questions. Folders have FastChat's layout:

    judge_prompts.jsonl                    (or inside of the bench's folder)
    <bench>/question.jsonl
    <bench>/reference_answer/<judge>.jsonl
"""

import hashlib
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from intactkv_eval.data.hub import ENV, mirror
from intactkv_eval.errors import DataError
from intactkv_eval.storage.files import cache_folder, write_atomic

PROMPTS = "judge_prompts.jsonl"
QUESTIONS = "question.jsonl"
REFERENCES = "reference_answer"
_SECONDS = 60
_MOST_BYTES = 2**20
_FASTCHAT = (
    "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/"
    "fastchat/llm_judge/data/"
)
_INTACTKV = (
    "https://raw.githubusercontent.com/ruikangliu/IntactKV/e9b841e9357c59ed800620373454110fc52fbfe4/fastchat/data/"
)


class PublishedQuestions(NamedTuple):
    """Where a file was published, at one commit, and the SHA-256 of its bytes."""

    url: str
    digest: str


def _at(origin: str, files: Mapping[str, str]) -> dict[str, PublishedQuestions]:
    return {name: PublishedQuestions(origin + name, digest) for name, digest in files.items()}


PUBLISHED = {
    **_at(
        _FASTCHAT,
        {
            "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
            "mt_bench/question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
            "mt_bench/reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
            "vicuna_bench/question.jsonl": "c248c5c98ba45bb0c2aadae2f270e643bd32679c6c306a3b2a503ac4254cdaa5",
            "vicuna_bench/reference_answer/gpt-4.jsonl": (
                "f7542dc25a5a869b32197486f5699a14eb5682ab3c7264518402399ec09ab470"
            ),
        },
    ),
    **_at(  # of the judge that IntactKV's tables were made with
        _INTACTKV,
        {
            "mt_bench/reference_answer/gpt-4-0125-preview.jsonl": (
                "5eee99ce140dcd4c62d9ffc1c68082f4d72fb0c2d52df7aee7dc6fcff841c3ac"
            ),
        },
    ),
}
"""Path below a folder in FastChat's layout -> where its published bytes are."""


def bench_file(bench: str, name: str, folder: str | Path | None = None) -> Path:
    """The file `name` (PROMPTS, QUESTIONS or REFERENCES/...) of a bench.

    folder: one with FastChat's layout, or the bench's own. Raises DataError where the file cannot be had.
    """
    root = Path(folder).expanduser() if folder else mirror()
    if root is None:
        return _published(name if name == PROMPTS else f"{bench}/{name}")
    places = [root / bench / name, root / name] if folder or name == PROMPTS else [root / bench / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        named = root if folder else f"{ENV}={root}"
        raise DataError(f"{named}: holds no {bench}/{name}; it should have the layout of FastChat's llm_judge/data")
    return found


def reference_sets(bench: str, folder: str | Path | None = None) -> list[str]:
    """The names of the judges whose reference answers there are, sorted."""
    root = Path(folder).expanduser() if folder else mirror()
    if root is None:
        below = f"{bench}/{REFERENCES}/"
        return sorted(Path(name).stem for name in PUBLISHED if name.startswith(below))
    places = [root / bench / REFERENCES, root / REFERENCES] if folder else [root / bench / REFERENCES]
    return sorted({path.stem for place in places for path in place.glob("*.jsonl")})


def _published(name: str) -> Path:
    """The published file, downloaded once. Raises DataError where it is unknown, unreachable or has other bytes."""
    if name not in PUBLISHED:
        raise DataError(f"{name}: not among the published files ({', '.join(PUBLISHED)}); name a folder that has it")
    path = cache_folder() / "mt_bench" / name
    url, digest = PUBLISHED[name]
    if not path.is_file() or _digest(path.read_bytes()) != digest:
        try:
            with urllib.request.urlopen(url, timeout=_SECONDS) as answer:
                content = answer.read(_MOST_BYTES)
        except OSError as error:
            raise DataError(f"{url}: {error}; for local files set {ENV} or name their folder") from None
        if _digest(content) != digest:
            raise DataError(f"{url}: {len(content)} bytes that are not the published ones; try again")
        write_atomic(path, lambda partial: partial.write_bytes(content))
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
