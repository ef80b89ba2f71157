"""Every limit of what is read from a stranger: bytes, depth, parts and time, and the only way in which bytes are read.

The limits are far above what real files need, and below what a machine of 16 GB can bear. `READERS` is the table of
docs/reliability.md, which scripts/limits_table.py writes. Knows no format and nothing else of this package.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

KIB, MIB, GIB = 2**10, 2**20, 2**30

DOCUMENT_BYTES = 256 * MIB  # JSON; the largest index of a known checkpoint has 25 MB, results of MMLU a few
DOCUMENT_DEPTH = 100  # levels; what walks through a document later may recurse
DOCUMENT_VALUES = 10_000_000  # of JSON, commas and brackets outside of texts; of YAML, with its aliases written out
YAML_BYTES = MIB  # YAML is read a hundred times as slowly as JSON
YAML_MERGED_KEYS = 100_000  # keys that merges (<<) bring in, all together
LINES_BYTES = 4 * GIB  # JSONL; samples of 14,000 documents with five shots have hundreds of MB
LINES_VALUES = 64_000_000  # its commas and brackets, those of its texts among them
TEXT_BYTES = 4 * GIB  # for calibration; ShareGPT's conversations, one JSON document, have 670 MB

PICKLE_BYTES = 64 * MIB
PICKLE_STEPS = 2_000_000  # about three seconds
PICKLE_PARTS = 10_000_000  # of a value, each as often as it occurs
TENSORS_TIMES = 4  # how much larger than a file of torch.save its tensors may be: two may share a storage
TORCH_LIST = 32 * MIB  # of such a file's list of parts, one for each tensor; a million of them are more than any has
HEADER_BYTES = 100 * MIB  # of a safetensors, as safetensors itself has it

TOKENIZER_BYTES = 512 * MIB  # of each file of a tokenizer; the largest known tokenizer.json has 35 MB
TOKEN_ID = 10_000_000  # the highest id of a vocabulary; the largest has a quarter of a million
TOKENIZER_STEPS = 256  # normalizers, decoders, ... of a tokenizer.json, of each kind
TOKENIZER_GROWTH = 1024  # characters that its steps, all together, make of one: 36 of a SentencePiece's, twice that
TOKENIZER_TEXT = 4096  # characters or tokens that a step puts in front of a text

LAYERS = 1_000  # five times what the deepest model has
SHARDS = 10_000  # that an index names; the most known are a few hundred
SPARE_BYTES = 256 * MIB  # that a model may have beside what its files can fill
WEIGHTS_TIMES = 4  # bytes for each byte of the weight files: fp8 to fp32
CODES_TIMES = 32  # the same of quantized weight files: codes of one bit
MODULES = 300_000  # of a model; the most known are 120,000, of 384 experts in 60 layers that are not fused

ARCHIVE_BYTES = 4 * GIB  # of a cluster's results, unpacked
ARCHIVE_FILES = 10_000
ARCHIVE_HEADER = 64 * KIB  # of a file's name and its attributes
PICTURE_BYTES = 32 * MIB
PICTURES_BYTES = 256 * MIB  # of a page
FIGURES_BYTES = 512 * MIB  # of the numbers behind figures, unpacked: 64 attention maps of 1,400 tokens
FIGURES_LIST = 64 * KIB  # of an archive's list of parts; there are about a dozen

EXPRESSION_SECONDS = 1  # of processor time, for the regular expressions of a tokenizer.json on short texts
TEMPLATE_SECONDS = 4  # of processor time: a busy machine makes no template slow
TEMPLATE_BYTES = 512 * MIB  # that its process may take beside what it has
TEMPLATE_CHARACTERS = 100_000  # of one prompt


class Reader(NamedTuple):
    """A line of the table: what is read, by which module, and what bounds its bytes, its parts and its time."""

    what: str
    module: str
    most_bytes: str
    parts: str
    time: str


def human_size(count: int) -> str:
    """A number of bytes for people: `256 MiB`."""
    for unit, word in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if count >= unit and count % unit == 0:
            return f"{count // unit} {word}"
    return f"{count:,} bytes"


_BY_SIZE = "by its bytes"
READERS = (
    Reader("results, plans, indices, configs, answers: JSON", "storage/documents.py", human_size(DOCUMENT_BYTES),
           f"{DOCUMENT_DEPTH} levels, {DOCUMENT_VALUES:,} values", "by its bytes and values"),
    Reader("cells and sweeps: YAML", "storage/documents.py", human_size(YAML_BYTES),
           f"{DOCUMENT_DEPTH} levels, {DOCUMENT_VALUES:,} values, {YAML_MERGED_KEYS:,} merged keys", _BY_SIZE),
    Reader("samples, conversations, replies: JSONL", "storage/files.py", human_size(LINES_BYTES),
           f"{LINES_VALUES:,} values; a line as a JSON document", _BY_SIZE),
    Reader("texts and conversations for calibration", "storage/files.py", human_size(TEXT_BYTES),
           "UTF-8; conversations as a JSON document", _BY_SIZE),
    Reader("safetensors", "storage/tensor_file.py, weights/checkpoint.py", "its own",
           f"a header of {human_size(HEADER_BYTES)}, checked against the file", _BY_SIZE),
    Reader("files of torch.save, answers of `--use_cache`", "storage/plain_pickle.py, storage/torch_pickle.py",
           f"{human_size(PICKLE_BYTES)} of pickle; tensors {TENSORS_TIMES} times the file",
           f"{DOCUMENT_DEPTH} levels, {PICKLE_PARTS:,} parts; a list of {human_size(TORCH_LIST)}",
           f"{PICKLE_STEPS:,} steps, about 3 s"),
    Reader("an index of shards", "weights/checkpoint.py", human_size(DOCUMENT_BYTES), f"{SHARDS:,} shards", _BY_SIZE),
    Reader("a model's structure", "assemble/load_errors.py, model/sizes.py",
           f"{WEIGHTS_TIMES} times its weight files ({CODES_TIMES} times where they are quantized) and "
           f"{human_size(SPARE_BYTES)}; buffers, once and as much", f"{LAYERS:,} layers, {MODULES:,} modules",
           "by its modules"),
    Reader("a tokenizer", "assemble/tokenizer_check.py, assemble/tokenizer_expressions.py",
           f"{human_size(TOKENIZER_BYTES)} a file",
           f"ids to {TOKEN_ID:,}; {TOKENIZER_STEPS} steps of a kind, which make at most {TOKENIZER_GROWTH} characters "
           f"of one and put in at most {TOKENIZER_TEXT:,}",
           f"its bytes; its regular expressions, on short texts, by {EXPRESSION_SECONDS} s of processor time"),
    Reader("a chat template, for `pivot=prompt`", "chat/sandbox.py", human_size(TEMPLATE_BYTES),
           f"{TEMPLATE_CHARACTERS:,} characters of a prompt", f"{TEMPLATE_SECONDS} s of processor time"),
    Reader("an archive of a cluster's results", "sweep/archive.py", f"{human_size(ARCHIVE_BYTES)}, unpacked",
           f"{ARCHIVE_FILES:,} files, {human_size(ARCHIVE_HEADER)} of attributes each", _BY_SIZE),
    Reader("pictures of `--figures`", "report/page.py", f"{human_size(PICTURE_BYTES)} each, "
           f"{human_size(PICTURES_BYTES)} all",
           "PNG, JPEG or SVG by their first bytes", _BY_SIZE),
    Reader("the numbers of `intactkv figures`", "report/plots.py, report/figure_numbers.py",
           f"{human_size(FIGURES_BYTES)}, unpacked",
           f"plain numbers of the shape that their bytes have; a list of {human_size(FIGURES_LIST)}", _BY_SIZE),
)  # fmt: skip
"""Of every reader of files from strangers."""


def table() -> str:
    """The table as Markdown."""
    rows = ["| what is read | at most | parts | time is bound by | where |", "|---|---|---|---|---|"]
    rows += [f"| {one.what} | {one.most_bytes} | {one.parts} | {one.time} | `{one.module}` |" for one in READERS]
    return "\n".join(rows)


def check_regular(path: Path, most: int | None = None) -> None:
    """Raise ValueError unless `path`, or what it is a link to, is a regular file of at most `most` bytes.

    A pipe waits for a writer, and a device never ends. Raises OSError as the file system does.
    """
    _check(path.stat(), most)


@contextmanager
def opened(path: Path, most: int) -> Iterator[IO[bytes]]:
    """A stranger's file, open for reading. Raises ValueError as `check_regular` does, or OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe does not wait
    try:
        _check(os.fstat(handle), most)
    except ValueError:
        os.close(handle)
        raise
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bytes(path: Path, most: int = DOCUMENT_BYTES) -> bytes:
    """The bytes of a stranger's file, at most `most`.

    Raises ValueError for what is no regular file or larger, OSError as the file system does.
    """
    with opened(path, most) as file:
        content = file.read(most + 1)
    if len(content) > most:  # it has grown
        raise ValueError(_too_large(len(content), most))
    return content


def _check(found: os.stat_result, most: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise ValueError("is a folder; expected a file")
    if not stat.S_ISREG(found.st_mode):
        kind = "pipe" if stat.S_ISFIFO(found.st_mode) else "socket" if stat.S_ISSOCK(found.st_mode) else "device"
        raise ValueError(f"is a {kind}, or a link to one; expected a regular file")
    if most is not None and found.st_size > most:
        raise ValueError(_too_large(found.st_size, most))


def _too_large(count: int, most: int) -> str:
    return f"has {count:,} bytes; expected at most {human_size(most)}"
