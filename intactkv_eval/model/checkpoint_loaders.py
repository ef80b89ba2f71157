"""Loading of what `pretrained` names: packed checkpoints natively, all others by transformers, and neither in part.

transformers itself fills tensors that are missing with random numbers; here they are an error.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from intactkv_eval.compat.transformers_api import before_loading
from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.packed import Placement, packed_model
from intactkv_eval.model.sizes import bound_modules, check_fits
from intactkv_eval.weights.checkpoint import Checkpoint, check_indexes, checkpoint_folder
from intactkv_eval.weights.formats import Format

_NOT_FOR_PACKED = ("quantization_config", "gguf_file", "subfolder", "offload_folder", "low_cpu_mem_usage")
_OF_HUB = ("cache_dir", "local_files_only", "force_download")
_OF_CONFIG = ("trust_remote_code", "attn_implementation")


class StrictAutoModel:
    """An auto class of transformers whose `from_pretrained` raises CheckpointError for a missing tensor.

    config: what stands for the checkpoint's config.json, None for that itself.
    """

    def __init__(self, auto_class: Any, config: PretrainedConfig | None = None) -> None:
        self._auto_class, self._config = auto_class, config

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model, every tensor of which came from the checkpoint (or is tied to one that did)."""
        check_indexes(Path(name) / str(options.get("subfolder") or ""))
        if self._config is not None:
            options["config"] = self._config

        def check(model: nn.Module, files: Sequence[str], quantized: bool) -> None:
            check_fits(model, name, files, quantized)

        try:
            with bound_modules(name), before_loading(check):
                model, found = self._auto_class.from_pretrained(name, output_loading_info=True, **options)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise CheckpointError(f"{name}: a tensor has not the shape that config.json says; see the report") from None
        missing = sorted(found["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{name}: {len(missing)} tensors are missing from the checkpoint and would be filled with random "
                f"numbers: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )
        return model


class PackedAutoModel:
    """The same for a packed checkpoint of `layout`, its quantized layers on `backend`."""

    def __init__(self, auto_class: Any, layout: Format, config: PretrainedConfig, backend: str) -> None:
        self._auto_class, self._layout, self._config, self._backend = auto_class, layout, config, backend

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model. Raises CheckpointError for an option that means nothing for a packed checkpoint."""
        idle = [key for key in _NOT_FOR_PACKED if options.pop(key, None) and key != "offload_folder"]
        dtype, revision = options.pop("dtype", "auto"), options.pop("revision", None) or "main"
        device_map: str | Mapping[str, Any] | None = options.pop("device_map", None)
        max_memory = options.pop("max_memory", None)
        for_config = {key: value for key in _OF_CONFIG if (value := options.pop(key, None)) is not None}
        for_hub = {key: value for key in _OF_HUB if (value := options.pop(key, None)) is not None}
        idle += [key for key, value in options.items() if value is not None]
        if idle:
            raise CheckpointError(f"{name} is a packed checkpoint, for which {', '.join(idle)} would do nothing")
        return packed_model(
            Checkpoint(checkpoint_folder(name, revision, **for_hub)),
            self._layout,
            self._config,
            self._auto_class,
            dtype if isinstance(dtype, torch.dtype) else None,
            self._backend,
            Placement(device_map, max_memory),
            **for_config,
        )


class CheckpointAutoModel:
    """An auto class that loads each name as its checkpoint is: packed, strictly, or with another config.

    auto_class: of transformers. special: what loads a name otherwise than strictly.
    """

    def __init__(self, auto_class: Any, special: Mapping[str, StrictAutoModel | PackedAutoModel]) -> None:
        self._strict, self._special = StrictAutoModel(auto_class), special

    def from_pretrained(self, name: str, **options: Any) -> Any:
        """The model, every tensor of which came from its checkpoint."""
        return self._special.get(name, self._strict).from_pretrained(name, **options)
