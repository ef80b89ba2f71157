"""Whether decoder layers that are run one by one compute what the model computes, tried before anything is quantized.

Calls are noted on one short sample and tried on another: each layer is given the model's own hidden states, and what it
makes of them is compared with what the model's next layer is given. What differs from sample to sample besides hidden
states (Gemma 4's embeddings per layer, keys that layers share), or is done between layers, shows as a difference.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_eval.compat.cache_use import CountingCache
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.hooks import hidden_of, watched
from intactkv_eval.model.layer_calls import LayerCall

_TOKENS = 32  # of a sample: what differs from sample to sample shows in a few
_NOISE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of what a layer adds, relative RMS; with 16 bits:
_NOISE_16_BITS = 5e-2
_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
Look = Callable[[int, Tensor, LayerCall], None]
"""(index of a decoder layer, its hidden states [1, T, C], the rest of its call)."""


@torch.no_grad()
def check_walk(
    model: nn.Module,
    layers: Sequence[nn.Module],
    samples: Sequence[Tensor],
    forward: Callable[[Tensor], None],
    new_cache: Callable[[], CountingCache | None],
    devices: Sequence[torch.device],
) -> None:
    """Compare layers that are run alone with the model.

    Args:
        model: The model, for its name.
        layers: Its decoder layers.
        samples: Tokens [T] each, at least one sample.
        forward: Runs the whole model on one sample.
        new_cache: The cache that a layer is given, if any.
        devices: Of each layer.

    Raises:
        UnsupportedModelError: A layer that is run alone departs from the model by more than rounding.
    """
    first, second = _two_samples(samples)
    noted: list[tuple[int, LayerCall]] = []
    with _before_each(layers, lambda index, hidden, call: noted.append((index, call))):
        forward(first)
    if [index for index, _ in noted] != list(range(len(layers))):
        raise UnsupportedModelError(
            f"{type(model).__name__}: its decoder layers are not run once each, one behind the other, so they cannot "
            "be calibrated one by one; use a method that needs no data: --method rtn"
        )
    under_way: list[tuple[Tensor, Tensor]] = []  # what the last layer was given, and what it alone makes of it
    calls: list[LayerCall] = []

    def compare(index: int, found: Tensor) -> None:
        given, alone = under_way.pop()
        difference = _difference(alone, found.to(alone.device), given.to(alone.device))
        if not difference <= _NOISE.get(found.dtype, _NOISE_16_BITS):
            size = f"departs from the model by {difference:.2g} of what it adds to hidden states"
            raise UnsupportedModelError(_message(model, index, layers[index], size, noted[index][1], calls[index]))

    def look(index: int, hidden: Tensor, call: LayerCall) -> None:
        if index:
            compare(index - 1, hidden)
        calls.append(call)
        try:
            alone = noted[index][1].run(layers[index], hidden, new_cache(), devices[index])
            # The walk gives a layer all samples before it comes to the next one: what a layer keeps is the last one's.
            noted[index][1].run(layers[index], hidden.flip(-2), new_cache(), devices[index])
        except _ERRORS as error:
            size = f"fails ({type(error).__name__}: {str(error)[:120]})"
            raise UnsupportedModelError(_message(model, index, layers[index], size, noted[index][1], call)) from error
        under_way.append((hidden, alone))

    def last(output: Any) -> None:
        if under_way:  # it comes before, too, when the layer is run alone
            compare(len(layers) - 1, hidden_of(output))

    with _before_each(layers, look), watched([layers[-1]], last):
        forward(second)


@contextmanager
def _before_each(layers: Sequence[nn.Module], look: Look) -> Iterator[None]:
    """While it lasts, `look` is given each call of a layer, but for those that it makes itself."""
    busy = False

    def hook(index: int) -> Callable[[nn.Module, Any, Any], None]:
        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            try:
                look(index, *LayerCall.of(args, kwargs))
            finally:
                busy = False

        return before

    held = [layer.register_forward_pre_hook(hook(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for one in held:
            one.remove()


def _two_samples(samples: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Two short samples of one length that differ in every place, where their tokens do."""
    length = min(_TOKENS, *map(len, samples)) if len(samples) > 1 else min(_TOKENS, len(samples[0]))
    first = samples[0][:length]
    second = next((sample[:length] for sample in samples[1:] if not torch.equal(sample[:length], first)), None)
    if second is None:
        second = torch.where(first > 0, first - 1, first + 1).flip(0)
    return first, second


def _difference(alone: Tensor, found: Tensor, given: Tensor) -> float:
    """Of two outputs of a layer that was given `given`: relative to what it adds; 0 where rounding explains it."""
    if alone.shape != found.shape:
        return float("inf")
    gap = (alone.double() - found.double()).norm()
    if gap <= 4 * torch.finfo(found.dtype).eps * found.double().norm():
        return 0.0
    added = (found.double() - given.double()).norm() if found.shape == given.shape else found.double().norm()
    return float(gap / added.clamp(min=torch.finfo(torch.float32).tiny))


def _message(model: nn.Module, index: int, layer: nn.Module, what: str, one: LayerCall, other: LayerCall) -> str:
    names = [name for name in other.kwargs if not _alike(one.kwargs.get(name), other.kwargs[name])]
    order = list(signature(layer.forward).parameters)[1:]  # the first one is the hidden states
    names += [name for name, *pair in zip(order, one.args, other.args, strict=False) if not _alike(*pair)]
    reason = "the model changes hidden states between its layers, or hands something from one to another"
    if names:
        reason = f"it is given {', '.join(names)}, which differ from sample to sample"
    return (
        f"{type(model).__name__}: decoder layer {index} ({type(layer).__name__}), run by itself on a second sample, "
        f"{what}: {reason}. It would be calibrated on hidden states that are not the model's; use a method that needs "
        "no data: --method rtn"
    )


def _alike(one: Any, other: Any) -> bool:
    """Whether two arguments of a layer are equal; objects that are no tensors are only where they hold none."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor)
