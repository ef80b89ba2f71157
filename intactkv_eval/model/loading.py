"""A quantized model from a full-precision one: build on meta, swap the linears, assign the tensors, verify.

The full-precision model is not changed; what is not quantized (embeddings, norms, lm_head) is shared with it, not
copied. Knows nothing of pivots and of the harness.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.activation_quant import InputStage, StagedLinear
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.matrices import finite_matrix
from intactkv_eval.model.structure import check_resident, linear_layers
from intactkv_eval.weights.input_transform import InputTransform
from intactkv_eval.weights.quantized import QuantizedWeight

Quantizer = Callable[[Tensor, str], QuantizedWeight]
"""A matrix [O, I] and the layer's name -> the quantized matrix."""


def quantized_model(
    source: PreTrainedModel,
    quantizer: Quantizer | None,
    backend: str = "auto",
    stages: Mapping[str, InputTransform] | None = None,
) -> PreTrainedModel:
    """`source` with every linear layer of its decoder layers quantized, and with input stages by the layers' names.

    Without a `quantizer` the matrices are shared as they are. Layers that `stages` does not name keep the stage they
    have in `source`. Raises UnsupportedModelError where a layer could not be quantized, CheckpointError where a tensor
    has no place, a place no tensor, or a matrix holds NaN; ConfigError from the quantizer (a group_size that does not
    fit).
    """
    layers, specs = linear_layers(source), stages or {}
    check_resident(source)
    target = _copy_on_meta(source)
    for name, layer in layers.items():
        held = layer.prepare.spec if isinstance(layer, StagedLinear) else InputTransform()
        spec = specs.get(name, held)
        prepare = None if spec.is_idle else InputStage(spec, name).to(layer.weight.device)
        if quantizer is None:
            swap(target, name, StagedLinear(layer, prepare or InputStage(spec)))
            continue
        weight = quantizer(finite_matrix(layer, name), name)
        swap(target, name, QuantizedLinear(weight, layer.bias, layer.weight.dtype, backend, name, prepare))
    _assign(target, source, swapped=set(layers))
    verify(target)
    target.eval().requires_grad_(False)
    devices = getattr(source, "hf_device_map", None)
    if devices and len(set(map(str, devices.values()))) > 1:
        dispatch_model(target, device_map=devices)
    return target


def _copy_on_meta(source: PreTrainedModel) -> PreTrainedModel:
    """The modules of `source` with every tensor on meta: its class may need more than a config, or its modules differ.

    Where accelerate has put its hooks around modules, they are built anew from the config, and get hooks of their own.
    """
    if any(hasattr(module, "_hf_hook") for module in source.modules()):
        return _build_on_meta(source)
    memo: dict[int, Any] = {}
    for parameter in source.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    for buffer in source.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(source, memo)


def _build_on_meta(source: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(source.config)
    with torch.device("meta"):
        target: PreTrainedModel = type(source)(config)
    target.config._attn_implementation = source.config._attn_implementation
    target.generation_config = copy.deepcopy(source.generation_config)
    target.name_or_path = source.name_or_path
    return target


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _assign(target: PreTrainedModel, source: PreTrainedModel, swapped: set[str]) -> None:
    """Give `target` every tensor of `source` that is not a swapped layer's."""
    tensors = {k: v for k, v in source.state_dict().items() if k.rpartition(".")[0] not in swapped}
    missing, unexpected = target.load_state_dict(tensors, strict=False, assign=True)
    held = tuple(f"{name}." for name in swapped)
    left_out = [key for key in missing if not key.startswith(held)]
    if left_out or unexpected:
        raise CheckpointError(f"tensors without a place: {unexpected[:5]}; places without a tensor: {left_out[:5]}")
    for name, module in source.named_modules():
        if name not in swapped and not name.startswith(held) and module._non_persistent_buffers_set:
            _assign_buffers(target, name, module)
    target.tie_weights()


def _assign_buffers(target: PreTrainedModel, name: str, module: nn.Module) -> None:
    """Buffers that no state dict holds (rotary frequencies, embedding scales) come from the source as they are.

    A leaf without parameters is taken whole: rotary embeddings keep more than their buffers.
    """
    if not list(module.parameters()) and not list(module.children()):
        swap(target, name, copy.deepcopy(module))
        return
    place = target.get_submodule(name)
    for key in module._non_persistent_buffers_set:
        place.register_buffer(key, copy.deepcopy(module._buffers[key]), persistent=False)


def verify(model: PreTrainedModel) -> None:
    """Raise CheckpointError where a tensor is left on meta: parameters, buffers, tensors kept as plain attributes."""
    for name, module in model.named_modules():
        held = {**module._parameters, **module._buffers, **vars(module)}
        for key, value in held.items():
            if isinstance(value, Tensor) and value.is_meta:
                raise CheckpointError(f"{name}.{key} was given no value: this architecture cannot be rebuilt quantized")
