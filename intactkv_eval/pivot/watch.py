"""Looking at what modules give out while a model runs, by hooks that are always taken off. Knows no model class."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def hidden_of(output: Any) -> Tensor:
    """The hidden states [1, T, C] among what a decoder layer returns."""
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


@contextmanager
def watched(modules: Iterable[nn.Module], look: Callable[[Any], object]) -> Iterator[None]:
    """While it lasts, `look` is given what each call of the modules returns."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        look(output)

    held = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for one in held:
            one.remove()


@contextmanager
def attention_watched(
    model: PreTrainedModel, layers: Sequence[nn.Module], look: Callable[[Tensor], object]
) -> Iterator[None]:
    """While it lasts, `look` is given the attention weights [H, T, T] of each of the decoder layers `layers`.

    The model computes attention the eager way meanwhile, which alone shows them.
    """

    def weights(output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            look(output[1][0])

    parts = [part for layer in layers for part in layer.modules() if "Attention" in type(part).__name__]
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        with watched(parts, weights):
            yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)
