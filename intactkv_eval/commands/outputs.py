"""What an output may replace: nothing, an empty file, or a file of the kind that the command writes. Never an input.

Every command asks here before it does any work. A file is known by what is in it, not by its name. `--overwrite` lets a
command replace a file of another kind, but neither an input nor a file of a model's folder. Knows no torch: of a
safetensors the header is read.
"""

import json
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.cell.config_files import load_config
from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.limits import HEADER_BYTES

REPLACES = "Let --out replace a file of another kind; never an input, or a file of a model."
"""The help of --overwrite."""
_HEAD = 2**16  # bytes of a file that tell its kind
_IS_MODEL = ("config.json", "adapter_config.json", "model.safetensors.index.json", "tokenizer.json")
# What loaders look for in a model's folder; a new file of such a name changes the model, too.
_OF_MODEL = re.compile(
    r"(model|pytorch_model|adapter_model|consolidated|tf_model|flax_model)([.-].*)?\.[a-z0-9]+|.*\.index\.json"
    r"|(.*_)?config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt"
    r"|chat_template\..*|spiece\.model|params\.json|modules\.json|.*\.(py|gguf)"
)


class OutputKind(NamedTuple):
    """What a command writes: its name for people, and whether a file is one, by its first 64 KiB and its path."""

    name: str
    holds: Callable[[bytes, Path], bool]


def _tensors(prefix: str) -> Callable[[bytes, Path], bool]:
    """A safetensors whose metadata says a format that begins with `prefix`."""

    def holds(head: bytes, path: Path) -> bool:
        size = int.from_bytes(head[:8], "little")
        if len(head) < 8 or size > min(HEADER_BYTES, path.stat().st_size):
            return False
        with path.open("rb") as file:
            file.seek(8)
            text = file.read(size)
        try:
            said = json.loads(text)["__metadata__"]["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return False
        return str(said).startswith(prefix)

    return holds


def _begins(*starts: bytes) -> Callable[[bytes, Path], bool]:
    return lambda head, _: head.lstrip().startswith(starts)


def _matches(pattern: bytes) -> Callable[[bytes, Path], bool]:
    expression = re.compile(pattern, re.DOTALL)
    return lambda head, _: expression.match(head) is not None


PIVOT = OutputKind("a PivotKV", _tensors("intactkv-pivot-"))
CODEBOOK = OutputKind("a KV codebook", _tensors("intactkv-kv-codebook-"))
PREFIX = OutputKind("a prefix of `intactkv pivots`", _matches(rb'\s*\{\s*"format":\s*"intactkv-prefix-'))
LOG = OutputKind("the log of a calibration", _begins(b"epoch,step,loss,held_out_blocks"))
CONVERSATIONS = OutputKind("answered conversations of a calibration", _matches(rb'\{"messages": \[[^\n]*\]\}\r?\n'))
ANSWERS = OutputKind("answers in FastChat's layout", _matches(rb'\{"question_id": [0-9]+, "answer_id": "'))
REPLIES = OutputKind("a judge's replies", _begins(b'{"key":"'))
PLAN = OutputKind("a sweep's plan", _matches(rb'\[\s*(\]|\{\s*"format": "intactkv-run-)'))
NUMBERS = OutputKind("the numbers of `intactkv figures`", _matches(rb'\{\s*"settings": .*"pivot_words": '))
TABLES = {
    "md": OutputKind("a table of `intactkv report`", _begins(b"| model | weights | kv | pivot |")),
    "csv": OutputKind("a table of `intactkv report`", _begins(b"model,weights,kv,pivot,")),
    "tex": OutputKind("a table of `intactkv report`", _begins(b"\\begin{tabular}{llll")),
    "json": OutputKind(
        "figures of `intactkv report`", _matches(rb'\[\s*\{.*"weights": .*"kv": .*"pivot": .*"status": ')
    ),
    "html": OutputKind("a page of `intactkv report`", _matches(rb".{0,2000}<title>IntactKV: ")),
}
"""Of `intactkv report`, by the ending of the file's name."""


def check_output(path: Path, kind: OutputKind, inputs: Iterable[object] = (), overwrite: bool = False) -> None:
    """Raise ConfigError unless `path` may be written: before any work, and before anything is loaded.

    Args:
        path: The file that a command will write.
        kind: What it writes there. A file of this kind may be replaced, and an empty one.
        inputs: What the command reads: values that name no file or folder are passed over.
        overwrite: A file of another kind may be replaced as well.

    Raises:
        ConfigError: It is an input under any name (a link to it, another spelling), a file of a model's folder, no
            regular file, or of another kind.
    """
    there = _status(path)
    places = [place for place in map(_place, inputs) if place is not None]
    same = next((place for place in places if there is not None and _is_same(path, place)), None)
    if same is not None:
        raise ConfigError(f"--out {path}: is the input {same}, which would be lost; name another file")
    is_ours = there is not None and _is_ours(path, kind, there)
    model = _model_of(path)
    if model is not None and (_OF_MODEL.fullmatch(path.name.casefold()) or not (there is None or is_ours)):
        raise ConfigError(
            f"--out {path}: would be a file of the model in {model}, which would be another model then; name a "
            "file in another folder"
        )
    if there is None or is_ours:
        return
    if not stat.S_ISREG(there.st_mode):
        raise ConfigError(f"--out {path}: is no regular file; name another one")
    inside = next((place for place in places if place.is_dir() and _is_below(path, place)), None)
    if inside is not None:
        raise ConfigError(f"--out {path}: is in the input {inside}, and not {kind.name}; name another file")
    if not overwrite:
        raise ConfigError(
            f"--out {path}: is there already, and is not {kind.name}, which is written here; name another file, or add "
            "--overwrite where it may be lost"
        )


def check_figures(folder: Path, names: Iterable[str], inputs: Iterable[object], overwrite: bool) -> None:
    """`check_output` of a folder of figures: pictures of these names are ours where the numbers beside them are."""
    given = list(inputs)
    check_output(folder / "figures.json", NUMBERS, given, overwrite)
    head = _head(folder / "figures.json") if _status(folder / "figures.json") else b""
    beside = OutputKind("a figure beside the numbers of `intactkv figures`", lambda *_: NUMBERS.holds(head, folder))
    for name in ("figures.npz", *names):
        check_output(folder / name, beside, given, overwrite)


def inputs_of(*arguments: Mapping[str, Any]) -> list[object]:
    """The values of model arguments, those of the YAML that `config` names among them."""
    found: list[object] = []
    for given in arguments:
        found += given.values()
        if given.get("config"):
            found += load_config(str(given["config"])).values()
    return found


def _status(path: Path) -> Any:
    """What is at `path`; None where there is nothing. Raises ConfigError for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError as error:
        if path.is_symlink():
            raise ConfigError(f"--out {path}: is a link that leads nowhere; name the file itself") from None
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return None
        raise ConfigError(f"--out {path}: {error.strerror}; name another file") from None


def _place(value: object) -> Path | None:
    """The file or folder that an input names, if it names one."""
    if not isinstance(value, str | Path) or not str(value):
        return None
    try:
        path = Path(value).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError):  # a text that is no name of a file
        return None


def _is_same(path: Path, place: Path) -> bool:
    """Links of both kinds, and names that a file system takes for one, are the same file."""
    try:
        return path.samefile(place)
    except OSError:
        return False


def _is_below(path: Path, folder: Path) -> bool:
    return any(_is_same(parent, folder) for parent in path.resolve().parents)


def _model_of(path: Path) -> Path | None:
    """The folder of `path`, or of the file that it is a link to, where a model lies in it."""
    folders = (path.absolute().parent, path.resolve().parent)
    return next((folder for folder in folders for name in _IS_MODEL if (folder / name).exists()), None)


def _is_ours(path: Path, kind: OutputKind, status: Any) -> bool:
    if not stat.S_ISREG(status.st_mode):
        return False
    try:
        return status.st_size == 0 or kind.holds(_head(path), path)
    except OSError:  # a file that may not be read is none that is known
        return False


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)
