"""Looking at what modules give out while a model runs, by hooks that are always taken off. Knows no model class."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.tensor_parts import tensor_parts


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


def where_not_finite(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` again and tell where NaN or infinite numbers first appear."""
    found: list[str] = []

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def look(_module: nn.Module, args: Any) -> None:
            if not found and args and not _is_finite(args[0]):
                found.append(f"in front of {name}: in attention or the KV cache, whose parts are no layers")

        return look

    def behind(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if found or _is_finite(output[0] if isinstance(output, tuple) and output else output):
                return
            held = [*module.named_parameters(recurse=False), *module.named_buffers()]
            bad = [key for key, tensor in held if not _is_finite(tensor)]
            most = f"; its input reaches {args[0].abs().max():.3g}" if args and _is_float(args[0]) else ""
            found.append(f"in {name}.{bad[0]}, a tensor of the model" if bad else f"in the output of {name}{most}")

        return look

    named = [(name, module) for name, module in model.named_modules() if name]
    held = [module.register_forward_pre_hook(before(name)) for name, module in named]
    held += [module.register_forward_hook(behind(name)) for name, module in named]
    try:
        forward()
    finally:
        for one in held:
            one.remove()
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), None)
    ends = (
        "; float16 ends at 65504, which massive activations pass: use dtype=bfloat16" if dtype == torch.float16 else ""
    )
    return (found[0] if found else "behind the last layer: in lm_head or the logits") + ends


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_finite(value: Any) -> bool:
    if not _is_float(value):
        return True
    return all(bool(torch.isfinite(part).all()) for _, part in tensor_parts("", value) if part.is_floating_point())


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

    def ask(_module: nn.Module, args: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**arguments, "output_attentions": True}

    parts = [part for layer in layers for part in layer.modules() if "Attention" in type(part).__name__]
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    # In early releases of transformers 5 some families compute the weights, and drop them unless they are asked for.
    asked = [part for part in parts if "output_attentions" in signature(part.forward).parameters]
    held = [part.register_forward_pre_hook(ask, with_kwargs=True) for part in asked]
    try:
        with watched(parts, weights):
            yield
    finally:
        for one in held:
            one.remove()
        if before != "eager":
            model.set_attn_implementation(before)
