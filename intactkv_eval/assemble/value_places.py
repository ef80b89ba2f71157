"""Which rows of which matrix make a model's values, and the norm in front of it: found in what the model computes.

The pivot's first token, twice, goes through the model, and each head's cached values are looked for among the outputs
of the layer's linear layers, number for number. So v_proj, a fused qkv_proj, and heads whose parts lie side by side are
all found, without a list of names. Models that change values before they cache them (a norm, a clamp), or cache a
latent, have no such place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import Conv1D
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.capture import computed

_TOKENS = 2  # at the first place alone a rotation does nothing, and what MLA caches for values would pass for them


class ValuePlace(NamedTuple):
    """Of one layer, by names inside it: rows [H * D] of the matrix of `layer`, in the order of the cache's values.

    norm: the module whose output is what that layer multiplies, None where there is none.
    """

    layer: str
    rows: Tensor
    norm: str | None


class _Seen(NamedTuple):
    name: str
    norm: str | None
    output: Tensor


def value_places(model: PreTrainedModel, token_ids: tuple[int, ...]) -> list[ValuePlace | None]:
    """The place of each decoder layer's values, None for a layer that caches something else than a matrix gives."""
    _, layers = decoder_layers(model)
    seen: list[list[_Seen]] = [[] for _ in layers]
    with _watched(layers, seen):
        own = computed(model, token_ids[:1] * _TOKENS)
    if len(own.values) != len(layers):
        return [None for _ in layers]
    return [_found(outputs, values[:, :_TOKENS].cpu()) for outputs, values in zip(seen, own.values, strict=True)]


def _found(outputs: Sequence[_Seen], values: Tensor) -> ValuePlace | None:
    for one in outputs:
        rows = _rows(one.output[: values.shape[1]], values)
        if rows is not None:
            return ValuePlace(one.name, rows, one.norm)
    return None


def _rows(output: Tensor, values: Tensor) -> Tensor | None:
    """Where each head of `values` [H, T, D] lies in `output` [T, O]; None where one does not.

    Heads that are alike, as those of a group are where a model caches them repeated, may be the same rows.
    """
    width = values.shape[2]
    starts: list[int] = []
    for head in values:
        first = (output[:, : output.shape[1] - width + 1] == head[:, :1]).all(0).nonzero()[:, 0].tolist()
        place = next((start for start in first if torch.equal(output[:, start : start + width], head)), None)
        if place is None:
            return None
        starts.append(place)
    return (torch.tensor(starts)[:, None] + torch.arange(width)).reshape(-1)


@contextmanager
def _watched(layers: nn.ModuleList, seen: Sequence[list[_Seen]]) -> Iterator[None]:
    """While it lasts, each layer's list gets what its linear layers give out for the first row's first tokens."""
    held = []
    for layer, outputs in zip(layers, seen, strict=True):
        norms: list[tuple[str, Tensor]] = []
        for name, module in layer.named_modules():
            if isinstance(module, (nn.Linear, Conv1D, QuantizedLinear)) or hasattr(module, "in_features"):
                held.append(module.register_forward_hook(_note_output(name, outputs, norms)))
            elif "norm" in type(module).__name__.lower():
                held.append(module.register_forward_hook(_note_norm(name, norms)))
    try:
        yield
    finally:
        for one in held:
            one.remove()


def _note_norm(name: str, norms: list[tuple[str, Tensor]]) -> Any:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            norms.append((name, output))

    return note


def _note_output(name: str, outputs: list[_Seen], norms: Sequence[tuple[str, Tensor]]) -> Any:
    def note(_module: nn.Module, inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or not inputs:
            return
        alike = (one for one, given in norms if given.shape == inputs[0].shape and torch.equal(given, inputs[0]))
        flat = output.detach().reshape(-1, output.shape[-1])[:_TOKENS]
        outputs.append(_Seen(name, next(alike, None), flat.to("cpu", copy=True)))

    return note
