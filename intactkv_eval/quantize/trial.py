"""Trying weights in a block and looking at what flows in it. Whatever is put in is taken out again.

The inside of a block is seen from hooks while `block.run` runs it, never by calling its attention: positions, masks and
the pivot's KV are only known to `run`, and a cache handed to attention a second time would have grown.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intactkv_eval.quantize.method import Block


class Inputs(NamedTuple):
    """What a layer is given: mean and greatest magnitude of each channel [I] over all samples, and [T, I] of some."""

    mean: Tensor
    greatest: Tensor
    samples: tuple[Tensor, ...]


@contextmanager
def substituted(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`layers` compute with `weights` [O, I], which may carry a gradient, instead of their own."""
    held = {name: layers[name].get_parameter("weight") for name in weights}
    try:
        for name, weight in weights.items():
            _put(layers[name], weight)
        yield
    finally:
        for name, parameter in held.items():
            _put(layers[name], parameter)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """The parameters of `module` in fp32 (none narrower); afterwards the very tensors that were there."""
    held = {parameter: parameter.data for parameter in module.parameters()}
    try:
        for parameter, data in held.items():
            parameter.data = data.to(torch.promote_types(data.dtype, torch.float32))
        yield
    finally:
        for parameter, data in held.items():
            parameter.data = data


@torch.no_grad()
def inputs_of(block: Block, name: str, kept: Sequence[int]) -> Inputs:
    """What the layer `name` is given when `block` runs on every sample; whole for the samples `kept`."""
    total: Tensor | None = None
    greatest: Tensor | None = None
    count, samples = 0, []
    for index in range(len(block.inputs)):
        found = _seen(block, name, index, before=True)
        flat = found.reshape(-1, found.shape[-1])
        size = flat.abs().float()
        total = size.sum(dim=0) if total is None else total + size.sum(dim=0)
        most = size.amax(dim=0)
        greatest = most if greatest is None else torch.maximum(greatest, most)
        count += len(flat)
        if index in kept:
            samples.append(flat)
    assert total is not None
    assert greatest is not None
    return Inputs(total / count, greatest, tuple(samples))


@torch.no_grad()
def output_of(block: Block, name: str, index: int) -> Tensor:
    """What the module `name` makes of sample `index` when `block` runs; what comes after it does not run."""
    return _seen(block, name, index, before=False)


@torch.no_grad()
def run_noting(block: Block, index: int, names: Collection[str], note: Callable[[str, Tensor], None]) -> None:
    """Run sample `index` until all modules `names` were called; `note(name, input)` for each."""
    _run_until(block, index, names, before=True, note=note)


class _SeenError(Exception):
    """Ends a run where all that was wanted of it has been seen."""


def _seen(block: Block, name: str, index: int, before: bool) -> Tensor:
    found: list[Tensor] = []
    _run_until(block, index, [name], before, lambda _, value: found.append(value))
    assert found, f"{block.name}.{name} took no part in running the block"
    return found[0]


def _run_until(
    block: Block, index: int, names: Collection[str], before: bool, note: Callable[[str, Tensor], None]
) -> None:
    waiting = set(names)

    def hook(name: str) -> Callable[..., None]:
        def called(_module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            value = args[0] if before else output
            note(name, value[0] if isinstance(value, tuple) else value)
            waiting.discard(name)
            if not waiting:
                raise _SeenError

        return called

    modules = {name: block.module.get_submodule(name) for name in names}
    hooks = [
        module.register_forward_pre_hook(hook(name)) if before else module.register_forward_hook(hook(name))
        for name, module in modules.items()
    ]
    try:
        with suppress(_SeenError):
            block.run(block.inputs[index], index)
    finally:
        for one in hooks:
            one.remove()


def _put(layer: nn.Module, weight: Tensor) -> None:
    parameters: dict[str, Any] = layer._parameters  # as torch.func.functional_call does: a tensor in its place
    parameters["weight"] = weight
