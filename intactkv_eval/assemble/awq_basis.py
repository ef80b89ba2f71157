"""The basis of V in a packed checkpoint whose writer may have scaled it, told from its reference's files.

The reference's tensors are read one layer at a time: the model need not be loaded for it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from intactkv_eval.assemble.value_places import ValuePlace, value_places
from intactkv_eval.compat.peft_api import adapters_of
from intactkv_eval.compat.transformers_api import Conv1D
from intactkv_eval.errors import PivotError
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.model.tensor_names import NamedCheckpoint
from intactkv_eval.pivot.basis import LayerBasis, check_residuals, recover, to_basis
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.weights.checkpoint import TensorSource, files_of

# RTN and GPTQ leave the weights where they are; AWQ and OmniQuant may not, in whatever format they are written.
MAY_BE_SCALED = frozenset({"awq", "omniquant", "compressed-tensors", "intactkv"})


def in_basis_of(
    pivot: PivotKV,
    model: PreTrainedModel,
    method: str,
    checkpoint: str,
    reference: str | None,
    unscaled: bool = False,
    tensors_of: Callable[[str], TensorSource] = files_of,
) -> tuple[PivotKV, float | None]:
    """`pivot`, of `reference`, in the basis of the quantized `model`; and the worst residual, None where V is plain.

    method: what wrote the checkpoint (reference_check.writer_of). unscaled: the weights, as far as they were sampled,
    are not scaled anywhere. tensors_of: of `reference`, by its name.

    Raises PivotError where it cannot be told (no reference, an architecture whose values are not a matrix's outputs),
    or where the residual says that the checkpoint is of another model.
    """
    if method not in MAY_BE_SCALED:
        return pivot, None
    if reference is None:
        raise PivotError(
            f"{checkpoint} ({method}) may have V scaled: name the full-precision model with reference=..., so that the "
            "scale can be recovered; a PivotKV file alone does not tell it"
        )
    kinds = adapters_of(model)
    if kinds:
        raise PivotError(
            f"{checkpoint} ({method}) may have V scaled, which is not told behind its adapters ({', '.join(kinds)}); "
            "merge them into the full-precision model, and quantize that"
        )
    places = value_places(model, pivot.token_ids)
    strange = next((index for index, place in enumerate(places) if place is None), None)
    if strange is not None and not unscaled:
        raise PivotError(
            f"{type(model).__name__}: the values that layer {strange} caches are no outputs of one of its matrices, so "
            f"it is not known how {checkpoint} ({method}), whose weights are scaled, scales them; take a checkpoint "
            "by a method that scales nothing (GPTQ, RTN)"
        )
    if strange is not None:
        return pivot, None
    source = NamedCheckpoint(tensors_of(reference), model)
    sites = zip(places, pivot.values, strict=True)
    found = [
        _of_layer(model, index, place, len(values), source)
        for index, (place, values) in enumerate(sites)
        if place is not None
    ]
    worst = check_residuals(found, checkpoint, reference)
    return to_basis(pivot, [layer.ratio for layer in found]), worst


def _of_layer(model: PreTrainedModel, index: int, place: ValuePlace, heads: int, source: NamedCheckpoint) -> LayerBasis:
    """heads: of the values in the cache."""
    prefix, layers = decoder_layers(model)
    layer: Any = layers[index]
    norm = layer.get_submodule(place.norm) if place.norm is not None else None
    names = [place.layer]
    if norm is not None and isinstance(getattr(norm, "weight", None), Tensor):
        names.append(str(place.norm))
    full, *front = read_layer(source, prefix, index, [f"{name}.weight" for name in names])
    quantized = dequantized(layer.get_submodule(place.layer))
    full = full if full.shape == quantized.shape else full.t()  # GPT-2 keeps its matrices so
    if full.shape != quantized.shape:
        raise PivotError(
            f"{prefix}.{index}.{place.layer} is {tuple(quantized.shape)}, and {tuple(full.shape)} in reference="
            f"{source.folder}: it is not of this architecture"
        )
    ones = torch.ones(full.shape[1])
    factors = (norm_factor(norm, front[0]), norm_factor(norm)) if norm is not None and front else (ones, ones)
    others = torch.ones(len(full), dtype=torch.bool)
    others[place.rows] = False
    if bool(others.any()):  # queries and keys in the same matrix: scaled, they would be in no basis that is known
        recover(quantized[others], full[others], *factors, folded=False)
    alike = heads == getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None)
    return recover(quantized[place.rows], full[place.rows], *factors, folded=alike)


@torch.no_grad()
def norm_factor(norm: torch.nn.Module, weight: Tensor | None = None) -> Tensor:
    """What a norm multiplies each channel [I] by, with another `weight` if one is given: tried on it.

    The trial's numbers are of size one and cancel in the mean, so that RMSNorm and LayerNorm change them alike.
    """
    own = {name: tensor.detach().float() for name, tensor in norm.named_parameters()}
    if weight is not None:
        own["weight"] = weight.float().to(own["weight"].device)
    x = torch.ones(own["weight"].numel(), device=own["weight"].device)
    x[1::2] = -1
    up, down = (functional_call(norm, own, (sign * x[None, None],))[0, 0] for sign in (1, -1))
    factor: Tensor = (up - down) / 2 * x
    return factor.float().cpu()


def dequantized(layer: torch.nn.Module) -> Tensor:
    """The matrix [O, I] of a layer, on the CPU, in fp32 where it is quantized."""
    if isinstance(layer, QuantizedLinear):
        return layer.quantized_weight().dequantize(torch.float32).cpu()
    matrix = layer.get_parameter("weight").detach().cpu()
    return matrix.t() if isinstance(layer, Conv1D) else matrix


def read_layer(source: NamedCheckpoint, prefix: str, index: int, names: Sequence[str]) -> list[Tensor]:
    """Tensors of one decoder layer from a reference's files, by their names in it.

    prefix: the list of layers in the model. Files of a model of another class may say it otherwise before its last word
    (`model.layers` for `layers`, `language_model.model.layers`). Raises PivotError where no list of layers holds them,
    or several do.
    """
    word = prefix.rpartition(".")[2]
    tails = [f".{index}.{name}" for name in names]
    stems = {name.removesuffix(tails[0]) for name in source.names if name.endswith(tails[0])}
    whole = {stem for stem in stems if all(f"{stem}{tail}" in source.names for tail in tails)}
    fitting = {prefix} & whole or {stem for stem in whole if stem.rpartition(".")[2] == word}
    if len(fitting) != 1:
        held = f"several: {', '.join(sorted(fitting))}" if fitting else "none: it is not of this architecture"
        raise PivotError(f"reference {source.folder}: expected one list of layers with {names[0]}, found {held}")
    stored = [f"{next(iter(fitting))}{tail}" for tail in tails]
    found = source.read(stored)
    return [found[name] for name in stored]
