"""Quantizing a model block by block: each on what the blocks before it, quantized already, make of the samples.

A finished block is on disk at once; a run that was killed reads it back and goes on, to the same bytes. In memory is
one model, never two. Knows no model class.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.quantize.method import Block, Method, install
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.tensor_file import read_tensor_file, save_tensors
from intactkv_eval.weights.quantized import QuantizedWeight

_PARTS = ("codes", "scales", "zeros", "order")


class Walk(Protocol):
    """The blocks of a model, in order."""

    def __len__(self) -> int: ...

    def block(self, index: int) -> Block:
        """Block `index`, before it is quantized."""
        ...

    def advance(self, index: int) -> None:
        """Go on behind block `index` as it is now."""
        ...


class Finished(NamedTuple):
    """One block: its quantized weights and its other tensors, by their names inside of it.

    divided: what its values were divided by, [H*D]; None where they were not.
    """

    layers: dict[str, QuantizedWeight]
    others: dict[str, Tensor]
    divided: Tensor | None = None


class BlockStore:
    """The finished blocks of one job in a folder. job: all that their bytes depend on.

    Raises ConfigError where the folder holds those of another job.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]) -> None:
        self.folder = folder
        said = json.dumps(job, indent=2, sort_keys=True) + "\n"
        path = folder / "job.json"
        if path.is_file() and path.read_text(encoding="utf-8") != said:
            differ = _difference(json.loads(path.read_text(encoding="utf-8")), json.loads(said))
            raise ConfigError(
                f"{folder} holds an unfinished run of another job ({differ}): repeat that one to go on with it, or "
                "remove the folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda partial: partial.write_text(said, encoding="utf-8"))

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether block `index` is finished."""
        return self._path(index).is_file()

    def keep(self, index: int, found: Finished) -> None:
        """Write block `index`, whole or not at all."""
        tensors = {f"others/{name}": tensor.cpu().contiguous() for name, tensor in found.others.items()}
        if found.divided is not None:
            tensors["divided"] = found.divided.cpu()
        shapes = {}
        for name, weight in found.layers.items():
            shapes[name] = [weight.bits, weight.group_size, weight.in_features]
            parts = {part: getattr(weight, part) for part in _PARTS}
            tensors |= {f"{part}/{name}": one.cpu().contiguous() for part, one in parts.items() if one is not None}
        metadata = {"layers": json.dumps(shapes)}
        write_atomic(self._path(index), lambda partial: save_tensors(partial, tensors, metadata))

    def read(self, index: int) -> Finished:
        """Block `index`. Raises CheckpointError where its file is damaged."""
        try:
            metadata, tensors = read_tensor_file(self._path(index))
            shapes = json.loads(metadata["layers"])
            layers = {}
            for name, (bits, group_size, width) in shapes.items():
                codes, scales, zeros = (tensors[f"{part}/{name}"] for part in _PARTS[:3])
                order = tensors.get(f"order/{name}")
                layers[name] = QuantizedWeight(codes, scales, zeros, bits, group_size, width, order)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self._path(index)}: damaged ({error}); remove it to do the block again") from error
        others = {key.removeprefix("others/"): tensor for key, tensor in tensors.items() if key.startswith("others/")}
        return Finished(layers, others, tensors.get("divided"))


def quantize_blocks(walk: Walk, method: Method, store: BlockStore, done: Callable[[], object] = lambda: None) -> None:
    """Quantize every block that the store does not hold yet; `done()` after each.

    Raises CheckpointError where a block cannot be read back, and as the method does.
    """
    for index in range(len(walk)):
        block = walk.block(index)
        if store.has(index):
            put_back(block, store.read(index))
        else:
            divided: list[Tensor] = []
            found = method.quantize(replace(block, divide_values=partial(_noting, block.divide_values, divided)))
            assert found.keys() == block.layers.keys(), "a method left a layer out"
            weights = {f"{name}.weight" for name in found}
            others = {name: tensor for name, tensor in block.module.state_dict().items() if name not in weights}
            store.keep(index, Finished(found, others, divided[0] if divided else None))
        walk.advance(index)
        done()


def _noting(divide: Callable[[Tensor], None] | None, divided: list[Tensor], factor: Tensor) -> None:
    divided.append(factor)
    if divide is not None:
        divide(factor)


@torch.no_grad()
def put_back(block: Block, found: Finished) -> None:
    """Give the block what its finished run had given it."""
    for name, tensor in found.others.items():
        held = block.module.get_submodule(name.rpartition(".")[0])
        getattr(held, name.rpartition(".")[2]).copy_(tensor)
    install(block, found.layers)
    if found.divided is not None and block.divide_values is not None:
        block.divide_values(found.divided)


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    keys = [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]
    return "; ".join(f"{key} {one.get(key)!r}, now {other.get(key)!r}" for key in keys[:3])
