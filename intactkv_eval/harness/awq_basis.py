"""Which tensors of a packed checkpoint and of its reference tell the basis of V, in the architectures that AWQ scales.

The reference's are read from its files, one layer at a time: the model need not be loaded for it.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.errors import CheckpointError, PivotError
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.basis import check_residuals, recover, to_basis
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.weights.checkpoint import Checkpoint, checkpoint_folder

logger = logging.getLogger(__name__)


class _Names(NamedTuple):
    norm: str
    value: str
    output: str


# RTN and GPTQ leave the weights where they are; AWQ and OmniQuant may not, in whatever format they are written.
_MAY_BE_SCALED = {"awq", "omniquant", "compressed-tensors", "intactkv"}
_LAYERS = (
    _Names("input_layernorm", "self_attn.v_proj", "self_attn.o_proj"),  # Llama, Mistral, Qwen, Gemma
    _Names("self_attn_layer_norm", "self_attn.v_proj", "self_attn.out_proj"),  # OPT
)


def in_basis_of(
    pivot: PivotKV, model: PreTrainedModel, method: str, checkpoint: str, reference: str | None
) -> tuple[PivotKV, float | None]:
    """`pivot`, captured from `reference`, in the basis of the packed `model`; and the worst residual.

    method: the checkpoint's format; of our own format what made it.

    Raises PivotError where it cannot be told (no reference, an architecture that is not known) though the format may
    hold scaled values, or where the residual says that the checkpoint is of another model.
    """
    prefix, layers = decoder_layers(model)
    names = next((names for names in _LAYERS if _fits(layers[0], names)), None)
    if method not in _MAY_BE_SCALED and (reference is None or names is None):
        return pivot, None
    if reference is None:
        raise PivotError(
            f"{checkpoint} ({method}) may have V scaled: name the full-precision model with reference=..., so that the "
            "scale can be recovered; a PivotKV file alone does not tell it"
        )
    if names is None:
        raise PivotError(f"{type(model).__name__}: it is not known where AWQ folds scales into V in this architecture")
    may_be_scaled = method in _MAY_BE_SCALED
    try:
        source = Checkpoint(checkpoint_folder(reference, "main"))
    except CheckpointError as error:
        if may_be_scaled:
            raise
        logger.warning("%s is not compared with reference=%s: %s", checkpoint, reference, error)
        return pivot, None
    kind = model.config.model_type
    gemma = 1 if "gemma" in kind and "gemma3n" not in kind else 0  # Gemma's norms multiply by 1 + weight
    found = []
    for index, layer in enumerate(layers):
        value, output = (layer.get_submodule(name) for name in (names.value, names.output))
        wanted = [f"{prefix}.{index}.{names.value}.weight", f"{prefix}.{index}.{names.norm}.weight"]
        full, norm_full = read_named(source, wanted, model.base_model_prefix)
        norm = layer.get_parameter(f"{names.norm}.weight").detach().cpu()
        alike = (value.in_features, value.out_features) == (output.in_features, output.out_features)
        folded = may_be_scaled and alike
        found.append(recover(dequantized(value), full, norm_full.float() + gemma, norm.float() + gemma, folded))
    worst = check_residuals(found, checkpoint, reference)
    return to_basis(pivot, [layer.ratio for layer in found]), worst


def dequantized(layer: torch.nn.Module) -> Tensor:
    """The matrix [O, I] of a layer, on the CPU, in fp32 where it is quantized."""
    if isinstance(layer, QuantizedLinear):
        return layer.quantized_weight().dequantize(torch.float32).cpu()
    return layer.get_parameter("weight").detach().cpu()


def _fits(layer: torch.nn.Module, names: _Names) -> bool:
    held = {name for name, _ in layer.named_modules()}
    return set(names) <= held


def read_named(source: Checkpoint, wanted: list[str], prefix: str) -> list[Tensor]:
    """Tensors of a reference by the model's names, with or without the base model's prefix. Raises PivotError."""
    stored = [name if name in source.names else name.removeprefix(f"{prefix}.") for name in wanted]
    absent = [name for name in stored if name not in source.names]
    if absent:
        raise PivotError(f"reference {source.folder}: holds no tensor {absent[0]}: it is not of this architecture")
    found = source.read(stored)
    return [found[name] for name in stored]
