"""Where a Hugging Face causal LM keeps what we touch: its decoder layers and the linear layers inside them.

Quantized are the linear layers of the decoder layers and nothing else: embeddings, lm_head and projections outside the
layers stay in full precision. A matrix inside a layer that is no linear layer (fused experts) is refused, not skipped.
"""

from typing import TypeAlias

import torch
from torch import nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import Conv1D, cache_layers
from intactkv_eval.errors import CheckpointError, UnsupportedModelError
from intactkv_eval.model.activation_quant import StagedLinear
from intactkv_eval.model.plain import is_plain_linear, scales_elementwise


def text_config(model: PreTrainedModel) -> object:
    """The config of the language model, also where it is nested in a multimodal one."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of decoder layers: the text decoder's, where the model has towers beside it.

    Raises UnsupportedModelError where there is no list of `num_hidden_layers` modules, or several side by side.
    """
    count = getattr(text_config(model), "num_hidden_layers", None)
    decoder = model.get_decoder()
    found = _lists(model, count, set(decoder.modules())) or _lists(model, count, set(model.modules()))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of {count} decoder layers is found, so it is not known what to quantize"
        )
    if len(found) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: {' and '.join(found)} are lists of {count} modules each, so it is not known "
            "which of them are the decoder layers"
        )
    return next(iter(found.items()))


def _lists(model: PreTrainedModel, count: int | None, among: set[nn.Module]) -> dict[str, nn.ModuleList]:
    """The lists of so many modules by full name, but for those that lie in one another."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and module in among and not inside:
            found[name] = module
    return found


def layer_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device of each decoder layer: they differ under device_map."""
    _, layers = decoder_layers(model)
    return [next(layer.parameters(), next(layer.buffers(), torch.empty(0))).device for layer in layers]


def cache_devices(model: PreTrainedModel) -> list[torch.device]:
    """The device of each layer's KV: of the decoder layers that cache any, which the others follow."""
    return layer_devices(model)[: len(cache_layers(model.config))]


def check_resident(model: PreTrainedModel) -> None:
    """Raise CheckpointError where device_map left weights on disk: there they are neither hashed nor quantized."""
    away = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if away:
        raise CheckpointError(
            f"{len(away)} weights ({away[0]}, ...) are offloaded by the device map: give the model more room, with "
            "max_memory_per_gpu or max_cpu_memory, more devices, or device=cpu without parallelize"
        )


LinearLayer: TypeAlias = nn.Linear | Conv1D | StagedLinear
"""A linear layer in full precision."""


def linear_layers(model: PreTrainedModel) -> dict[str, LinearLayer]:
    """The linear layers to quantize, by full name, in order.

    Raises UnsupportedModelError where a decoder layer holds a matrix that is not a linear layer's.
    """
    prefix, layers = decoder_layers(model)
    found: dict[str, LinearLayer] = {}
    for name, module in layers.named_modules(prefix=prefix):
        if isinstance(module, (Conv1D, StagedLinear)) or (isinstance(module, nn.Linear) and is_plain_linear(module)):
            found[name] = module
        elif matrices := matrices_of(module):
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name}.{matrices[0]} {tuple(module.get_parameter(matrices[0]).shape)} in a "
                f"{type(module).__name__} is a matrix but not a plain linear layer "
                "(fused experts, adapters or already quantized layers); "
                "it would stay in full precision unnoticed, so this model is refused"
            )
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__}: its decoder layers hold no linear layer to quantize")
    return found


def matrices_of(module: nn.Module) -> list[str]:
    """The names of the matrices that a module itself holds; weights of a norm are none, whatever their shape."""
    held = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim >= 2]
    return [] if held and scales_elementwise(module) else held
