"""A checkpoint's files: config, and tensors read from safetensors by name, sharded or not, from a folder or the hub.

Nothing is held: a tensor is read when it is asked for and is the caller's. Pickles are refused unread. Knows no model.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.limits import SHARDS, check_regular, read_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_NAME = 255  # characters that a file's name may have
# Where older releases of AutoGPTQ and AutoAWQ wrote what config.json says today, and the method that it means.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


class Checkpoint:
    """The weight files of one folder, by tensor name. Raises CheckpointError where they are not whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = _listed(folder)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._file_of)

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        return [self.folder / name for name in sorted(set(self._file_of.values()))]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, on the CPU, with storage of their own."""
        wanted: dict[str, list[str]] = {}
        for name in names:
            wanted.setdefault(self._file_of[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, inside in wanted.items():
            # Opened anew each time: a mapped file counts as memory for as long as it is open.
            with _opened(self.folder / file) as tensors:
                found.update({name: tensors.get_tensor(name).clone() for name in inside})
        return found


class HeldTensors:
    """The tensors of a loaded model, read as those of a folder's files are."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.folder = name
        self._tensors = tensors

    @property
    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._tensors)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, on the CPU, with storage of their own."""
        return {name: self._tensors[name].detach().to("cpu", copy=True) for name in names}


TensorSource: TypeAlias = Checkpoint | HeldTensors


def files_of(reference: str) -> TensorSource:
    """The tensors of a model that is named, on the hub's main branch. Raises CheckpointError where there are none."""
    return Checkpoint(checkpoint_folder(reference, "main"))


def quantization_beside(file_of: Callable[[str], Path | None]) -> dict[str, Any] | None:
    """What an older release's separate file says of a model's quantization, as config.json says it today; or None.

    file_of: the file of a name in the checkpoint, None where it holds none.
    """
    for name, method in _BESIDE.items():
        path = file_of(name)
        if path is not None:
            return {"quant_method": method, **read_json(path)}
    return None


def checkpoint_folder(pretrained: str, revision: str, **hub: Any) -> Path:
    """The folder of a checkpoint: `pretrained` itself, or a snapshot of the hub's.

    `hub` are options of huggingface_hub's snapshot_download. Raises CheckpointError where neither is there.
    """
    if Path(pretrained).is_dir():
        return Path(pretrained)
    patterns = ["*.json", "*.safetensors"]
    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=patterns, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise CheckpointError(f"{pretrained}: neither a folder nor to be had from the hub ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file holds none."""
    try:
        found = parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(found).__name__}")
    return found


def _listed(folder: Path) -> dict[str, str]:
    """Tensor name -> file name. An index may have another name than today's: AutoGPTQ's began with the model's."""
    indexes = [folder / INDEX] if (folder / INDEX).is_file() else sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        return _indexed(folder, indexes[0])
    files = [SINGLE] if (folder / SINGLE).is_file() else sorted(file.name for file in folder.glob("*.safetensors"))
    if len(files) == 1:
        with _opened(folder / files[0]) as tensors:
            return dict.fromkeys(tensors.keys(), files[0])
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if files:
        raise CheckpointError(f"{folder}: {len(files)} safetensors files and no {INDEX} that says what is in which")
    if pickles:
        raise CheckpointError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run any code when it is read; expected "
            "safetensors: convert it where you trust it (AutoModelForCausalLM ... save_pretrained), or take another"
        )
    raise CheckpointError(
        f"{folder}: no weights: expected {SINGLE} or {INDEX} with its shards (pickles are not fetched from the hub)"
    )


def _indexed(folder: Path, index: Path) -> dict[str, str]:
    found = _weight_map(index)
    held: dict[str, set[str]] = {}
    for file in sorted(set(found.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder}: the shard {file} that {index.name} names is missing; download it anew")
        with _opened(folder / file) as tensors:
            held[file] = set(tensors.keys())
    absent = [name for name, file in found.items() if name not in held[file]]
    if absent:
        raise CheckpointError(f"{folder / found[absent[0]]}: {absent[0]} should be in it by {index.name}, and is not")
    return found


def check_indexes(folder: Path) -> None:
    """Raise CheckpointError where a file in `folder` leads transformers to weights outside of it.

    An index of shards can, of whatever format; and config.json, which may say what the weights' file is called.
    """
    named = _named_weights(folder)
    found = set(folder.glob("*.index*.json")) | ({folder / named} if named and named.endswith(".json") else set())
    for index in sorted(found):
        _weight_map(index)


def _named_weights(folder: Path) -> str | None:
    """What config.json says the weights' file is called (`transformers_weights`), which is a file of the folder."""
    config = folder / "config.json"
    if not config.is_file():
        return None
    try:
        name = read_json(config).get("transformers_weights")
    except CheckpointError:
        return None  # transformers says what is wrong with it
    if name is None:
        return None
    if not isinstance(name, str) or PurePath(name).is_absolute() or {"..", "\\"} & {*PurePath(name).parts, *name}:
        raise CheckpointError(
            f"{config}: transformers_weights={str(name)[:80]!r} is no file in the folder of the model; remove the key"
        )
    return name


def _is_plain(name: object) -> bool:
    """Whether it names a file without any folder."""
    return isinstance(name, str) and Path(name).name == name and "\\" not in name and len(name) <= _LONGEST_NAME


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, each in the folder of `index`."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index}: expected weight_map, the file of each tensor")
    names = set(found.values())
    if len(names) > SHARDS:
        raise CheckpointError(f"{index}: names {len(names):,} files; expected at most {SHARDS:,} shards")
    for name in sorted(names):
        if not _is_plain(name):
            raise CheckpointError(f"{index}: names {name[:80]!r}, which is outside the folder or no file's name")
    return found


def _opened(path: Path) -> Any:
    try:
        check_regular(path)
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); download it anew") from None
