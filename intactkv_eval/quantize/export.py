"""Write a quantized checkpoint that others load, in one of the formats of weights/formats: whole or not at all.

Knows no model: names and tensors in, a folder out. config.json says what was done, by whom.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.storage.files import place_folder
from intactkv_eval.storage.tensor_file import save_tensors
from intactkv_eval.weights.checkpoint import INDEX
from intactkv_eval.weights.formats import FORMATS, intactkv
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.quantized import QuantizedWeight

SHARD = "5GB"
_BESIDE = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja", "generation_config.json")


def export(
    out: Path,
    layout: str,
    scheme: CheckpointScheme,
    config: Mapping[str, Any],
    layers: Mapping[str, QuantizedWeight],
    others: Mapping[str, Tensor],
    beside: Path | None = None,
) -> None:
    """Write `layers` in `layout` and the `others` (biases, norms, embeddings) as they are, into the new folder `out`;
    tokenizer and generation settings come from the folder `beside`.

    Raises ConfigError for an unknown layout, one that cannot say what the scheme's input stages are, or a folder that
    holds something; CheckpointError for a layer that the layout cannot hold, by name.
    """
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: use one of {', '.join(FORMATS)}")
    if scheme.has_stages and layout != intactkv.NAME:
        raise ConfigError(
            f"--format {layout}: others would load it and compute without the rotation or the quantized activations; "
            f"use {intactkv.NAME}"
        )
    check_new(out)
    tensors = dict(others)
    for name, weight in layers.items():
        try:
            held = FORMATS[layout].encode(weight, scheme)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        tensors.update({f"{name}.{key}": value.contiguous() for key, value in held.items()})
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed here
    partial.mkdir(parents=True)
    try:
        _save(partial, tensors)
        said = {**config, "quantization_config": FORMATS[layout].describe(scheme)}
        (partial / "config.json").write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
        if beside is not None:
            _copy(beside, partial)
        mode = (partial / "config.json").stat().st_mode
        for file in partial.iterdir():
            file.chmod(mode)  # safetensors lets nobody else read its files
        if out.exists():
            out.rmdir()
        place_folder(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(out: Path) -> None:
    """Raise ConfigError unless `out` is a new or empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: already holds something; name a new folder, or remove it first")


def _copy(source: Path, out: Path) -> None:
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


def _save(folder: Path, tensors: dict[str, Tensor]) -> None:
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD)
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: tensors[name] for name in names}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
