"""Input stages of a whole model: which layer gets which, putting them there, and calibrating static ranges.

Knows models and stages; no pivots and no data: what is run for a calibration is the caller's.
"""

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.cell.spec import ActivationSpec
from intactkv_eval.errors import CheckpointError, ConfigError, UnsupportedModelError
from intactkv_eval.model.activation_quant import InputStage, StagedLinear, activations_off
from intactkv_eval.model.linear import QuantizedLinear, quantized_layers
from intactkv_eval.model.loading import swap
from intactkv_eval.model.structure import decoder_layers, linear_layers, matrices_of
from intactkv_eval.weights.input_transform import InputTransform, Range, Rotation


def input_transforms(
    names: "list[str]",
    rotation: Rotation | None,
    activations: ActivationSpec,
    ranges: Mapping[str, Range] | None = None,
) -> dict[str, InputTransform]:
    """The stage of each of the layers `names` that needs one.

    Raises ConfigError where static ranges are missing or belong to no layer, or an online transform does.
    """
    online, held = (rotation.online if rotation else {}), ranges or {}
    static = activations.bits < 16 and activations.scheme == "tensor"
    strange = sorted({*online, *held} - set(names))
    missing = [name for name in names if name not in held] if static else []
    if strange or missing or (held and not static):
        raise ConfigError(
            f"input stages: static ranges missing for {missing[:3] or 'none'}; ranges or online transforms for "
            f"{strange[:3] or list(held)[:3] or 'none'}, which are no quantized layers, or not with act_scheme=tensor"
        )
    made = {name: InputTransform(online.get(name), activations, held.get(name)) for name in names}
    return {name: spec for name, spec in made.items() if not spec.is_idle}


def apply_input_transforms(
    model: PreTrainedModel,
    rotation: Rotation | None,
    activations: ActivationSpec,
    ranges: Mapping[str, Range] | None = None,
) -> None:
    """Give `model` its input stages, in place, in front of quantized and full-precision layers alike.

    Stages that it had are replaced: call it again to turn quantizers on or off. A full-precision layer keeps its
    tensors and becomes a StagedLinear. Raises ConfigError as `input_transforms`, UnsupportedModelError where a matrix
    would be passed over.
    """
    layers = transformed_layers(model)
    specs = input_transforms(list(layers), rotation, activations, ranges)
    for name, layer in layers.items():
        spec = specs.get(name, InputTransform())
        stage = None if spec.is_idle else InputStage(spec, name).to(_device(layer))
        if isinstance(layer, QuantizedLinear):
            layer.prepare = stage
        elif isinstance(layer, StagedLinear):
            layer.prepare = stage or InputStage(InputTransform())
        elif stage is not None:
            swap(model, name, StagedLinear(layer, stage).train(layer.training))


def _device(layer: nn.Module) -> torch.device:
    """Without asking for `weight`, which a packed layer would dequantize."""
    return next(chain(layer.parameters(), layer.buffers())).device


def transformed_layers(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that a stage may stand in front of: the quantized ones, or all linear layers of the decoder layers.

    Raises UnsupportedModelError where only a part of them is quantized.
    """
    found = quantized_layers(model)
    if not found:
        return dict(linear_layers(model))
    prefix, layers = decoder_layers(model)
    for name, module in layers.named_modules(prefix=prefix):
        held = [] if isinstance(module, QuantizedLinear) else matrices_of(module)
        if held:
            raise UnsupportedModelError(
                f"{name}.{held[0]} is not quantized, other layers are: activations stay as they are"
            )
    return found


@torch.no_grad()
def calibrate_ranges(model: PreTrainedModel, run: Callable[[], None]) -> dict[str, Range]:
    """Run `run` and give the lowest and highest number of every layer's input, behind its online transform.

    Activation quantizers are off meanwhile. All that is run counts: leave padding out, and the pivot where its rows
    come from a cache. Its hooks are always removed. Raises CheckpointError for NaN or inf, by layer, ConfigError for a
    layer that saw nothing.
    """
    layers = transformed_layers(model)
    found: dict[str, Range] = {}
    hooks = [layer.register_forward_pre_hook(_watch(name, found)) for name, layer in layers.items()]
    try:
        with activations_off(model):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [name for name in layers if name not in found]
    if unseen:
        raise ConfigError(f"calibration ran nothing through {', '.join(unseen[:3])}: give it text")
    return found


def _watch(name: str, found: dict[str, Range]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        stage = getattr(module, "prepare", None)
        x = inputs[0] if stage is None else stage.rotated(inputs[0])
        low, high = (float(end) for end in torch.aminmax(x))
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            raise CheckpointError(
                f"{name}: its input holds NaN or infinite values, so it has no range; use dtype=bfloat16"
            )
        before = found.get(name, (low, high))
        found[name] = (min(low, before[0]), max(high, before[1]))

    return note
