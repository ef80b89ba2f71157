"""Whether scales may be folded where a file says so: tried on the model itself, which stays as it is.

    front's output / p,  inputs of the layers behind * p,      p: 1 or 8 by channel

Powers of two lose nothing in floating point. So every matrix is given what it was given before, in any dtype, unless
something else reads the front too, or what lies between is not linear. Knows no architecture.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TOKENS = 4
_FACTOR = 8.0
_DIFFERENT = 1 / 4  # of a number: nothing that rounding does to it
_SHARE = 1 / 8  # of a matrix's inputs: a front that it reads alone changes about half


class Fold(NamedTuple):
    """Modules by name: the front, and all that read it, whose inputs are `width` wide."""

    front: str
    layers: tuple[str, ...]
    width: int


@torch.no_grad()
def changed_by(model: Any, folds: Sequence[Fold]) -> str | None:
    """The first matrix of a causal LM that is given something else where the folds are made, None where none is."""
    words = model.get_input_embeddings().weight
    ids = torch.linspace(0, len(words) - 1, _TOKENS, device=words.device).long()[None]
    before: list[tuple[str, Tensor]] = []
    after: list[tuple[str, Tensor]] = []
    with _inputs_seen(model, before):
        model(input_ids=ids, use_cache=False)
    with _folded(model, folds), _inputs_seen(model, after):
        model(input_ids=ids, use_cache=False)
    pairs = zip(before, after, strict=True)
    return next((name for (name, plain), (_, found) in pairs if _differ(plain, found)), None)


def _differ(plain: Tensor, found: Tensor) -> bool:
    counted = (plain != 0) | (found != 0)
    other = counted & ~((plain - found).abs() <= _DIFFERENT * plain.abs())
    return int(other.sum()) > _SHARE * int(counted.sum())


@contextmanager
def _inputs_seen(model: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """While it lasts, `seen` gets what is put into each matrix, in order; behind hooks that are there already."""

    def look(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: seen.append((name, args[0].detach().clone()))

    held = [
        module.register_forward_pre_hook(look(name))
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for one in held:
            one.remove()


@contextmanager
def _folded(model: nn.Module, folds: Sequence[Fold]) -> Iterator[None]:
    """While it lasts, each front gives out less in half of its channels, and the layers behind take them up again."""
    generator, held = torch.Generator().manual_seed(0), []

    def divided(factor: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            made = output.clone()
            made[..., -len(factor) :] /= factor.to(made)  # V is the last part of a fused qkv
            return made

        return hook

    def multiplied(factor: Tensor) -> Callable[[nn.Module, Any], tuple[Any, ...]]:
        return lambda _module, args: (args[0] * factor.to(args[0]), *args[1:])

    try:
        for fold in folds:
            factor = torch.where(torch.randperm(fold.width, generator=generator) % 2 == 0, _FACTOR, 1.0)
            held.append(model.get_submodule(fold.front).register_forward_hook(divided(factor)))
            held += [model.get_submodule(name).register_forward_pre_hook(multiplied(factor)) for name in fold.layers]
        yield
    finally:
        for one in held:
            one.remove()
