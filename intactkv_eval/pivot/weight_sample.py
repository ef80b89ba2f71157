"""A sample of a model's weights, by which a quantized copy of a model is told from a copy of another model.

Of every tensor of the text decoder, and of the output embeddings, it holds numbers at places that depend on the
tensor's shape alone: 16 rows of a matrix [O, I] in 4 blocks of 32 adjacent columns, up to 1024 numbers of a vector.
Embeddings have their rows at places that do not depend on the size of the vocabulary, which may have been padded.

A layer whose matrix is not held as plain numbers (bitsandbytes, FP8, HQQ, torchao, ...) is asked for its columns: it is
called on rows of the identity. Names are those inside the decoder, so that a wrapper's text model and the same model
alone have the same ones. Knows no quantizer, and no format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.tensor_parts import is_wrapper, plain_numbers
from intactkv_eval.compat.transformers_api import Conv1D

_ROWS, _EXPERT_ROWS = 16, 64
_BLOCKS, BLOCK = 4, 32
_NUMBERS = 1024  # of a vector
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

INPUT, OUTPUT = "embeddings", "lm_head"
"""What the input and the output embeddings are called, wherever the model keeps them."""


class Sampled(NamedTuple):
    """Numbers of one tensor: [R, C] of a matrix, [N] of a vector. plain: they lie in the model as such numbers."""

    numbers: Tensor
    plain: bool


def kinds_of_codes(model: PreTrainedModel) -> set[str]:
    """What holds the matrices of linear layers that are no plain numbers: classes of tensors or layers, or dtypes.

    By it a model shows that it is quantized where its config does not say so.
    """
    found: set[str] = set()
    for module in model.modules():
        if not _is_linear(module) or any(True for _ in module.children()):
            continue
        weight = getattr(module, "weight", None)
        if _is_plain(weight):
            continue
        if isinstance(weight, Tensor):
            plain = type(weight) in (Tensor, nn.Parameter)
            found.add(str(weight.dtype).removeprefix("torch.") if plain else type(weight).__name__)
        else:
            found.add(type(module).__name__)
    return found


@torch.no_grad()
def weight_sample(model: PreTrainedModel) -> dict[str, Sampled]:
    """The sample of a model as it is loaded, on the CPU, by names inside its decoder.

    Layers that hold no plain matrix are run, one by one, on 128 rows of the identity.
    """
    found: dict[str, Sampled] = {}
    front, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = [(name, module) for name, module in _body(model).named_modules() if module not in (front, head)]
    seen: list[tuple[str, nn.Module]] = [(INPUT, front)] if front is not None else []
    seen += [*inside, *([(OUTPUT, head)] if head is not None else [])]
    for name, module in seen:
        words = name in (INPUT, OUTPUT)
        for key, sampled in _of_module(module, model.dtype, words):
            found[f"{name}.{key}"] = Sampled(sampled.numbers.to("cpu", copy=True), sampled.plain)
    return found


def _body(model: PreTrainedModel) -> nn.Module:
    """The text decoder; the base model, where what transformers takes for a decoder is a single layer."""
    decoder: nn.Module = model.get_decoder()
    base: nn.Module = model.base_model
    return decoder if any(isinstance(module, nn.ModuleList) for module in decoder.modules()) else base


def _of_module(module: nn.Module, dtype: torch.dtype, words: bool) -> Iterator[tuple[str, Sampled]]:
    own = dict(module.named_parameters(recurse=False))
    embeds = isinstance(getattr(module, "weight", None), Tensor) and _wraps_embedding(module)
    if _is_linear(module) and not embeds and not (set(own) <= {"weight", "bias"} and _is_plain(own.get("weight"))):
        yield "weight", Sampled(_of_quantized(module, dtype, words), plain=False)
        own.pop("weight", None)
    for key, held in own.items():
        plain = _is_plain(held)
        value = held if plain or not is_wrapper(held) else plain_numbers(held)
        if not _is_plain(value):
            continue
        if value.ndim >= 2:
            matrix = value.t() if isinstance(module, Conv1D) else value.flatten(0, -2)
            yield key, Sampled(_taken(matrix, _rows(matrix.shape[0], words, value.ndim)), plain=plain)
        else:
            flat = value.detach().reshape(-1)
            places = _rows(flat.numel(), words) if words else _evenly(flat.numel(), _NUMBERS)
            yield key, Sampled(flat[places.to(flat.device)], plain=plain)


def _of_quantized(module: Any, dtype: torch.dtype, words: bool) -> Tensor:
    """Of the matrix that a layer multiplies by: the one that it shows, else what it makes of rows of the identity."""
    shown = getattr(module, "weight", None)
    rows = _rows(int(module.out_features), words)
    adapted = any(True for child in module.children() for _ in child.parameters())  # LoRA shows what it adds to
    if not adapted and _is_plain(shown) and shown.shape == (module.out_features, module.in_features):
        return _taken(shown, rows)
    columns = _columns(int(module.in_features))
    held = next((tensor for tensor in (*module.parameters(), *module.buffers())), torch.empty(0))
    asked = torch.zeros(len(columns), int(module.in_features), dtype=dtype, device=held.device)
    asked[torch.arange(len(columns)), columns] = 1
    with _without_bias(module):
        given: Tensor = module(asked)
    return given[:, rows.to(given.device)].t()


@contextmanager
def _without_bias(module: nn.Module) -> Iterator[None]:
    """While it lasts the layer adds nothing: beside a large bias a weight would lose its last digits."""
    bias = module._parameters.get("bias")
    if bias is None:
        yield
        return
    module._parameters["bias"] = None
    try:
        yield
    finally:
        module._parameters["bias"] = bias


def _is_linear(module: nn.Module) -> bool:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    return all(isinstance(size, int) and size > 0 for size in sizes)


def _wraps_embedding(module: nn.Module) -> bool:
    """An adapter around an embedding has the sizes of a linear layer, and takes ids."""
    return any(isinstance(child, nn.Embedding) for child in module.children())


def _is_plain(tensor: Any) -> TypeGuard[Tensor]:
    """Whether a tensor is one of numbers that mean themselves; subclasses hold codes."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.dtype in _FLOATS and tensor.ndim > 0 and tensor.numel() > 0


def _taken(matrix: Tensor, rows: Tensor) -> Tensor:
    columns = _columns(matrix.shape[1]).to(matrix.device)
    return matrix.detach()[rows.to(matrix.device)][:, columns]


def _evenly(size: int, count: int) -> Tensor:
    """`count` places below `size`, or all."""
    return torch.arange(size) if size <= count else torch.arange(count) * size // count


def _rows(size: int, words: bool, dimensions: int = 2) -> Tensor:
    """Of words the places 0 to 3, and then each a quarter farther on: the same in a vocabulary that was padded."""
    if not words:
        return _evenly(size, _ROWS if dimensions == 2 else _EXPERT_ROWS)
    places, place = list(range(4)), 4.0
    while place < size:
        places.append(int(place))
        place *= 1.25
    return torch.tensor([place for place in dict.fromkeys(places) if place < size])


def _columns(size: int) -> Tensor:
    """Blocks of adjacent columns, each within one group of a quantizer."""
    if size <= _BLOCKS * BLOCK:
        return torch.arange(size)
    starts = _evenly(size // BLOCK, _BLOCKS) * BLOCK
    return (starts[:, None] + torch.arange(BLOCK)).reshape(-1)
