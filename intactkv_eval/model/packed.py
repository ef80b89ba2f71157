"""A quantized model from a packed checkpoint: build on meta, read layer by layer, swap, assign, verify.

At no time is more of the checkpoint in memory than what is built of it and one layer. Knows nothing of pivots.
"""

import copy
import ctypes
import logging
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from accelerate.utils import get_max_memory, set_module_tensor_to_device
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from intactkv_eval.compat.transformers_api import Conv1D, ignored_tensors, no_init_weights, tied_tensors
from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.activation_quant import InputStage
from intactkv_eval.model.declared import without_quantization
from intactkv_eval.model.linear import QuantizedLinear
from intactkv_eval.model.loading import swap, verify
from intactkv_eval.model.sizes import bound_modules, check_fits
from intactkv_eval.model.tensor_names import NamedCheckpoint
from intactkv_eval.weights.checkpoint import Checkpoint
from intactkv_eval.weights.formats import Format
from intactkv_eval.weights.formats.layer import LayerTensors

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"(^|[._])experts?\.")
# Buffers that older releases saved and that models compute themselves.
LAYOUT = "intactkv_layout"
"""The attribute of a model that holds the format which its packed layers were read from."""
_COMPUTED = (r"rotary_emb\.inv_freq$", r"attn\.(masked_)?bias$")


class Placement(NamedTuple):
    """Where modules go, in accelerate's words: a device or a map of them, and the room on each device."""

    device_map: str | Mapping[str, Any] | None = None
    max_memory: Mapping[Any, Any] | None = None


def packed_model(
    checkpoint: Checkpoint,
    layout: Format,
    config: PretrainedConfig,
    auto_class: Any,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    placement: Placement | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The model of a packed checkpoint, its quantized layers on `backend`. `dtype` None: the config's.

    `options` go to the auto class' from_config. Raises CheckpointError for a tensor that is missing, is not what the
    config says, or has no place; ConfigError where the backend cannot run a layer.
    """
    _check_sizes(checkpoint, config, auto_class, options)
    model = _skeleton(config, auto_class, dtype, options)
    names = _Names(checkpoint, model, layout.tensors)
    places = _devices(model, *(placement or Placement()))
    packed = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, Conv1D)) and names.has(f"{name}.{layout.main}")
    }
    if not packed:
        raise CheckpointError(f"{checkpoint.folder}: no layer holds {layout.main}, though its config says quantized")
    if any(layer is model.get_output_embeddings() for layer in packed.values()):
        model.config.tie_word_embeddings = False  # packed codes are no embedding matrix
    _check_online(layout, packed, checkpoint)
    _assign(model, names, places, packed)  # the embeddings first: read and copied they need room that layers will take
    for name, layer in packed.items():
        swap(model, name, _read_layer(names, layout, name, layer, model.dtype, backend, places.of(name)))
        _give_back_freed_memory()
    _check_whole(model, names)
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta and buffer.device != places.of(name):
            set_module_tensor_to_device(model, name, places.of(name))
    verify(model)
    model.name_or_path = str(checkpoint.folder)
    setattr(model, LAYOUT, layout)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    model.eval().requires_grad_(False)
    if len(places.all) > 1:
        dispatch_model(model, device_map=dict(places.table))
    return model


def _check_online(layout: Format, packed: Collection[str], checkpoint: Checkpoint) -> None:
    """A transform that the config says of a layer that is not there would be left out without a word."""
    rotation = layout.rotation
    strange = sorted(set(rotation.online if rotation else ()) - set(packed))
    if strange:
        raise CheckpointError(f"{checkpoint.folder}: its config rotates the input of {strange[0]}, which is not packed")


def _give_back_freed_memory() -> None:
    """glibc keeps what the temporaries of each layer leave between them: twice the model, after hundreds of layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class _Names:
    """The checkpoint's tensors by the model's names, each taken once: what is never taken has no place."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel, packed: Collection[str]) -> None:
        self.checkpoint = checkpoint
        self._named = NamedCheckpoint(checkpoint, model, packed)
        self._unread = set(self._named.names)
        _check_converted(self._named)

    @property
    def unread(self) -> frozenset[str]:
        return frozenset(self._unread)

    def has(self, name: str) -> bool:
        return name in self._unread

    def stored_as(self, name: str) -> str:
        return self._named.stored_as(name)

    def take(self, wanted: list[str]) -> dict[str, Tensor]:
        """Read these tensors, each once."""
        self._unread -= set(wanted)
        return self._named.read(wanted)


def _check_converted(named: NamedCheckpoint) -> None:
    """Raise CheckpointError for tensors that transformers joins or splits when it loads them: packed ones it cannot."""
    folder, converted = named.folder, named.converted
    experts = [name for name in (*converted, *named.placeless) if _EXPERT.search(name)]
    if experts:
        raise CheckpointError(
            f"{folder}: is a mixture of experts whose experts are stored apart ({experts[0]}, ...); packed checkpoints "
            "with experts are not read yet: evaluate the full-precision checkpoint (pretrained=...), or a dense model"
        )
    if converted:
        raise CheckpointError(
            f"{folder}: {converted[0]} is not stored as the model holds it: transformers joins, splits or transposes "
            "it when it loads a full-precision checkpoint, which is not done for packed ones; evaluate that one"
        )


class _ModulePlaces:
    """Where each module goes."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        self.table = {name: torch.device(place) for name, place in table.items()}
        self.all = set(self.table.values())

    def of(self, name: str) -> torch.device:
        place = name
        while place not in self.table:
            if not place:
                raise CheckpointError(f"device_map: says nothing of {name}; name every module, or '' for the rest")
            place = place.rpartition(".")[0]
        return self.table[place]


def _skeleton(
    config: PretrainedConfig, auto_class: Any, dtype: torch.dtype | None, options: dict[str, Any]
) -> PreTrainedModel:
    """The model with its parameters on meta and the buffers that it computes for itself in place."""
    config = without_quantization(copy.deepcopy(config))
    with init_empty_weights(include_buffers=False), no_init_weights():
        model: PreTrainedModel = auto_class.from_config(config, dtype=dtype or config.dtype or torch.float16, **options)
    return model


def _check_sizes(checkpoint: Checkpoint, config: PretrainedConfig, auto_class: Any, options: dict[str, Any]) -> None:
    """Raise CheckpointError where the files cannot fill the model: its buffers are allocated when it is built."""
    with torch.device("meta"), bound_modules(str(checkpoint.folder)), no_init_weights():
        model = auto_class.from_config(without_quantization(copy.deepcopy(config)), **options)
    check_fits(model, str(checkpoint.folder), checkpoint.files, quantized=True)


def _devices(model: PreTrainedModel, device_map: Any, max_memory: Mapping[Any, Any] | None) -> _ModulePlaces:
    if device_map is None:
        return _ModulePlaces({"": "cpu"})
    if not isinstance(device_map, str):
        return _ModulePlaces(device_map)
    # Packed layers take a byte or less for each weight: counted as one, so that the map errs to the safe side.
    small = {
        f"{name}.weight": torch.int8 for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, Conv1D))
    }
    found = infer_auto_device_map(
        model,
        max_memory=get_max_memory(max_memory),
        no_split_module_classes=list(model._no_split_modules or ()),
        special_dtypes=small,
        dtype=model.dtype,
    )
    if "disk" in found.values() or ("cpu" in found.values() and len(set(found.values())) > 1):
        raise CheckpointError(
            f"device_map={device_map}: the model does not fit on the devices, and offloaded layers are not supported: "
            "give it more room with max_memory_per_gpu, or use device=cpu without parallelize"
        )
    return _ModulePlaces(found)


def _read_layer(
    names: _Names,
    layout: Format,
    name: str,
    layer: nn.Linear | Conv1D,
    dtype: torch.dtype,
    backend: str,
    device: torch.device,
) -> QuantizedLinear:
    held = [key for key in (*layout.tensors, "bias") if names.has(f"{name}.{key}")]
    stored = names.stored_as(f"{name}.{layout.main}").rpartition(".")[0]
    tensors = {key.rpartition(".")[2]: value for key, value in names.take([f"{name}.{key}" for key in held]).items()}
    bias = tensors.pop("bias", None)
    inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
    kinds = frozenset({"Linear", *(kind.__name__ for kind in type(layer).__mro__)})
    held_tensors = LayerTensors(name, tensors, inputs, outputs, stored, kinds)
    weight, stage = layout.read(held_tensors), layout.stage(held_tensors)
    if bias is None and layer.bias is not None:
        raise CheckpointError(f"{name}.bias: expected the tensor, found only {', '.join(sorted(held))}")
    if bias is not None:
        if tuple(bias.shape) != (outputs,):
            raise CheckpointError(f"{name}.bias: expected shape {(outputs,)}, found {tuple(bias.shape)}")
        # Some writers add a bias of zeros to layers that have none.
        bias = None if layer.bias is None and not bias.any() else bias.to(device, dtype)
    prepare = None if stage.is_idle else InputStage(stage, name).to(device)
    return QuantizedLinear(weight.to(device), bias, dtype, backend, name, prepare)


def _assign(model: PreTrainedModel, names: _Names, places: _ModulePlaces, packed: Collection[str]) -> None:
    """Everything that is not a packed layer's: embeddings, norms, layers left in full precision."""
    state, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    wanted = {name for name, tensor in state.items() if tensor.is_meta or name in buffers}
    for name in sorted(name for name in wanted & names.unread if name.rpartition(".")[0] not in packed):
        (value,) = names.take([name]).values()
        expected = model.get_parameter_or_buffer(name)
        if value.shape != expected.shape:
            raise CheckpointError(f"{name}: expected shape {tuple(expected.shape)}, found {tuple(value.shape)}")
        value = value.to(expected.dtype) if value.is_floating_point() else value
        set_module_tensor_to_device(model, name, places.of(name), value=value)
    _tie(model)


def _tie(model: PreTrainedModel) -> None:
    """Tied tensors are one, whichever of the two names was stored; stored apart and unlike, they stay apart."""
    pairs: Mapping[str, str] = tied_tensors(model)
    for target, source in pairs.items():
        one, other = model.get_parameter(target), model.get_parameter(source)
        if other.is_meta and not one.is_meta:
            set_module_tensor_to_device(model, source, one.device, value=one.detach())
        elif not one.is_meta and not other.is_meta and not torch.equal(one, other.to(one.device)):
            logger.warning("%s and %s are stored apart and differ: they are not tied", target, source)
            model.config.tie_word_embeddings = False
    if getattr(model.config, "tie_word_embeddings", False):
        model.tie_weights()


def _check_whole(model: PreTrainedModel, names: _Names) -> None:
    tied = set(tied_tensors(model))
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta and name not in tied)
    ignored = [*_COMPUTED, *ignored_tensors(model)]
    left = [name for name in sorted(names.unread) if not any(re.search(pattern, name) for pattern in ignored)]
    left = [name for name in left if name not in tied]
    if missing or left:
        raise CheckpointError(
            f"{names.checkpoint.folder}: tensors that are missing: {missing[:3] or 'none'}; that have no place in "
            f"{type(model).__name__}: {left[:3] or 'none'}"
        )
