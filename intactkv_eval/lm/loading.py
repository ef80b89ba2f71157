"""The loading half of IntactKVLM: what `pretrained` and `reference` name, or are, as models.

Handles objects and adapters.
"""

import copy
from pathlib import Path
from typing import Any

from intactkv_eval.assemble.checkpoint_info import CheckpointInfo, quantization_in_memory
from intactkv_eval.assemble.checks import IN_MEMORY, REFERENCE_IN_MEMORY
from intactkv_eval.assemble.load_errors import auto_class_of, check_folder, check_no_kernel
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.assemble.model_objects import OF_REFERENCE, HandedOver, check_wrapper
from intactkv_eval.assemble.open_source import checkpoint_loader, take_quantization
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.compat.lm_eval_api import HFLM, with_cpu_memory
from intactkv_eval.compat.peft_api import (
    adapters_of,
    check_peft_is_here,
    merged,
    untied,
    whole_adapters,
    with_adapters_of,
)
from intactkv_eval.compat.transformers_api import attention_implementation
from intactkv_eval.compat.wrapped_models import replaced_forwards, unwrapped
from intactkv_eval.errors import ConfigError, UnsupportedModelError
from intactkv_eval.lm.hf_arguments import ADAPTERS, OF_PRETRAINED


class CellLoading(HFLM):
    """`hf` that loads the models of a cell. What it uses is made by the class that inherits it."""

    cell: CellSpec
    hf_arguments: dict[str, Any]
    _model: Any
    AUTO_MODEL_CLASS: Any
    _objects: dict[str, HandedOver]
    _checkpoint: CheckpointInfo
    _models: ModelCache | None

    def _build(self, load: Any) -> None:
        raise NotImplementedError

    def _take_object(self, arguments: dict[str, Any]) -> None:
        """Build the cell of a model that was handed over; `arguments` are those of `hf`, for a reference's loading."""
        model = self._objects[IN_MEMORY].model
        self._checkpoint = quantization_in_memory(model)
        keys = ("trust_remote_code", *(key for key in arguments if key in OF_REFERENCE))
        kwargs = {"attn_implementation": attention_implementation(model), **{key: arguments.get(key) for key in keys}}
        given = {key: value for key, value in kwargs.items() if value is not None}
        self._create_model(IN_MEMORY, dtype=self.cell.model.dtype, gpus=0, **given)

    def _create_model(self, pretrained: str, revision: str = "main", **kwargs: Any) -> None:
        """Build the cell where lm_eval would load one model; each of its models is loaded as lm_eval loads one."""
        self._check_adapters(kwargs)
        merge = self._merges_adapters

        def load(name: str, revision: str) -> Any:
            if name in self._objects:
                return self._object(name, merge)
            own = kwargs if name == pretrained else {k: v for k, v in kwargs.items() if k not in OF_PRETRAINED}
            if self._objects or self._models is None:
                return self._loaded(name, revision, own, merge)
            layout = self.cell.backend if self._checkpoint.layout is not None and name == pretrained else ""
            merging = merge and any(own.get(key) for key in ADAPTERS)
            key = (name, revision, layout, merging, str(self.device), repr(sorted(own.items())))
            return self._models.get_or_load(key, lambda: self._loaded(name, revision, own, merge))

        self._build(load)

    def _loaded(self, name: str, revision: str, options: dict[str, Any], merge: bool) -> Any:
        """A model as lm_eval's `hf` loads it, whole, out of its wrappers, with the adapters that belong to it."""
        check_folder(name)
        check_no_kernel(name, revision, options.get("attn_implementation"))
        with whole_adapters():
            super()._create_model(pretrained=name, revision=revision, **options)
        whole, self._model = self._model.eval(), None
        model: Any = untied(unwrapped(whole).model)
        check_wrapper(whole, model)
        carrier = self._objects.get(IN_MEMORY)
        if name != self.cell.model.pretrained and carrier is not None and adapters_of(carrier.model):
            model = with_adapters_of(carrier.model, model)
        return merged(model) if merge else model

    def _object(self, name: str, merge: bool) -> Any:
        """The object that stands behind `name`; a reference that has no adapters with those of the evaluated model."""
        model, carrier = self._objects[name].model, self._objects.get(IN_MEMORY)
        if name == REFERENCE_IN_MEMORY and carrier is not None and not adapters_of(model):
            kinds = adapters_of(carrier.model)
            model = with_adapters_of(carrier.model, copy.deepcopy(model)) if kinds else model
        if not merge:
            return model
        strange = replaced_forwards(model)
        if strange:
            raise UnsupportedModelError(
                f"{name}: the forward of {strange[0] or type(model).__name__} is a function that was put into the "
                "object. A copy with quantized layers would still call the layers of the object itself; quantize "
                "nothing, or write that forward into a class"
            )
        return merged(model)

    @property
    def _merges_adapters(self) -> bool:
        """Whether the cell changes linear layers, which must be plain ones for it."""
        weights = self.cell.weights
        return weights.method != "none" or weights.rotate or self.cell.activations.bits < 16

    def _record_of_objects(self) -> dict[str, Any] | None:
        """What a run tells of models that were given as objects, and of adapters; None where there is neither."""
        evaluated = self._objects.get(IN_MEMORY)
        adapters = list(adapters_of(evaluated.model)) if evaluated is not None else []
        adapters += [f"{key}={self.hf_arguments[key]}" for key in sorted(ADAPTERS) if self.hf_arguments.get(key)]
        if not self._objects and not adapters:
            return None
        own = self.cell.pivot.intact and self.cell.model.reference is None
        return {
            **{name: item.record() for name, item in self._objects.items()},
            "adapters": adapters,
            "adapters_merged": bool(adapters) and self._merges_adapters,
            "pivot_is_its_own": own and self.cell.pivot.kind != "kv_file",
        }

    @property
    def _modified(self) -> set[str]:
        """The models that are not what the files under their names say: objects, and what an adapter is put on."""
        given = {key for key, value in self.hf_arguments.items() if value}
        carrier = self._objects.get(IN_MEMORY)
        adapted = bool(given & ADAPTERS) or (carrier is not None and bool(adapters_of(carrier.model)))
        changed = {self.cell.model.pretrained} if adapted or given & OF_PRETRAINED else set()
        return changed | set(self._objects) | ({self.cell.model.reference or ""} if adapted else set())

    def _check_adapters(self, arguments: dict[str, Any]) -> None:
        """Raise ConfigError for adapters (`peft`, `delta`) that cannot be put on what the cell names."""
        given = [key for key in sorted(ADAPTERS) if arguments.get(key)]
        if not given:
            return
        key, value = given[0], arguments[given[0]]
        if len(given) > 1:
            raise ConfigError("delta and peft: hf takes one of them; put the other into the model's folder first")
        if key == "peft":
            check_peft_is_here(str(value))
        if self._checkpoint.layout is not None:
            raise ConfigError(
                f"{key}={value}: {self.cell.model.pretrained} is a packed checkpoint, into whose layers nothing can be "
                f"added; merge it into the full-precision model, and quantize that: intactkv quantize"
            )
        held = self._objects.get(REFERENCE_IN_MEMORY)
        if held is not None and not (key == "peft" and adapters_of(held.model)):
            raise ConfigError(
                f"reference: the model that was handed over is without {key}={value}, which belongs to the "
                "full-precision model as well; name the reference by its folder, and it is put on both"
            )
        named = self.cell.model.reference if held is None else None
        if named is not None and self.cell.model.revision != "main" and not Path(str(value)).is_dir():
            raise ConfigError(
                f"revision={self.cell.model.revision}: hf reads {key}={value} in the revision of the model that it is "
                f"put on, and the reference is read in its main one; name a local folder with {key}=..."
            )

    def _get_config(self, pretrained: str, *args: Any, **kwargs: Any) -> None:
        """A packed checkpoint is read natively: what its config says of it is kept from transformers' quantizers."""
        super()._get_config(pretrained, *args, **kwargs)
        self.AUTO_MODEL_CLASS = auto_class_of(pretrained, self._config) or self.AUTO_MODEL_CLASS
        self._checkpoint = take_quantization(pretrained, self._config, self.cell.model.revision)

    def _get_backend(self, *args: Any, **kwargs: Any) -> None:
        super()._get_backend(*args, **kwargs)
        self.AUTO_MODEL_CLASS = checkpoint_loader(self.cell, self._config, self._checkpoint, self.AUTO_MODEL_CLASS)

    def _get_accelerate_args(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return with_cpu_memory(super()._get_accelerate_args(*args, **kwargs), kwargs.get("max_cpu_memory"))
