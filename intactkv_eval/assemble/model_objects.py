"""Models that a user hands over as objects, in the place of a folder or a name, out of their wrappers and checked.

Behind these checks an object is treated as its folder would be. Knows no pivot and no quantizer.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizer, PreTrainedTokenizerFast

from intactkv_eval.assemble.checks import IN_MEMORY, REFERENCE_IN_MEMORY
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.compat.module_copies import probe
from intactkv_eval.compat.peft_api import adapters_of, is_peft_model, untied
from intactkv_eval.compat.wrapped_models import unwrapped
from intactkv_eval.errors import CheckpointError, ConfigError, UnsupportedModelError
from intactkv_eval.model.structure import decoder_layers
from intactkv_eval.pivot.capture import check_supported

logger = logging.getLogger(__name__)

_WORDS = (str, int, float, bool)


@dataclass(frozen=True)
class HandedOver:
    """model: what was inside. given: the class of the object. wrappers: what was taken off it, the outermost first."""

    model: PreTrainedModel
    given: str
    wrappers: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What a run tells of the object; `name_or_path` is what the object says of itself."""
        return {
            "class": f"{type(self.model).__module__}.{type(self.model).__name__}",
            "name_or_path": self.model.name_or_path,
            "given_as": self.given,
            "wrapped_by": list(self.wrappers),
            "adapters": list(adapters_of(self.model)),
            "rounded_buffers": rounded_buffers(self.model),
        }


def take_objects(cell: dict[str, Any]) -> dict[str, HandedOver]:
    """The objects among the arguments of a cell, by the names that are put in their places there.

    Raises ConfigError for an object that is no model, UnsupportedModelError or CheckpointError for one that cannot be
    evaluated.
    """
    found: dict[str, HandedOver] = {}
    for key, name in (("pretrained", IN_MEMORY), ("reference", REFERENCE_IN_MEMORY)):
        value = cell.get(key)
        if isinstance(value, os.PathLike):
            cell[key] = os.fspath(value)
        elif value is not None and not isinstance(value, _WORDS):
            found[name] = handed_over(value, key)
            cell[key] = name
    return found


def handed_over(value: Any, key: str) -> HandedOver:
    """The model in `value`, the object that was given as `key`, in evaluation mode."""
    given = type(value).__name__
    inside = unwrapped(value) if isinstance(value, nn.Module) else None
    if inside is None or not isinstance(inside.model, PreTrainedModel):
        names = ("model", "pretrained_model", "module")
        held = next((name for name in names if isinstance(getattr(value, name, None), nn.Module)), None)
        raise ConfigError(
            f"{key}: an object of the class {given} was given; expected a folder or hub name, or a PreTrainedModel of "
            "transformers, alone or in torch.compile, DataParallel, DistributedDataParallel or a PeftModel"
            + (f". Its .{held} may be one" if held else "")
        )
    model = untied(inside.model)
    _check_whole(model, key)
    check_supported(model)
    decoder_layers(model)
    model.eval()
    _check_head(model)
    check_wrapper(value.eval(), model)
    rounded = rounded_buffers(model)
    if rounded:
        logger.warning(
            "%s: %s of the model that was handed over is in %s, as model.to(dtype) makes it; a model that is loaded "
            "with from_pretrained(..., dtype=) has it in fp32, and other numbers", key, rounded[0], model.dtype,
        )  # fmt: skip
    return HandedOver(model, given, inside.wrappers)


def _check_whole(model: PreTrainedModel, key: str) -> None:
    """Raise CheckpointError where numbers are not in the object itself."""
    tensors = dict(model.named_parameters())
    away = [name for name, tensor in tensors.items() if tensor.is_meta]
    if away:
        raise CheckpointError(
            f"{key}: {len(away)} weights of the model that was handed over ({away[0]}, ...) are on the device meta: it "
            "was built without numbers, or its device map offloaded them. Load it with from_pretrained on devices with "
            "room for all of it"
        )
    sharded = [name for name, tensor in tensors.items() if type(tensor).__name__ == "DTensor"]
    if sharded:
        raise UnsupportedModelError(
            f"{key}: {len(sharded)} weights of the model that was handed over ({sharded[0]}, ...) are shards (DTensor) "
            "of FSDP or tensor parallelism: save it, and give the folder"
        )


def rounded_buffers(model: PreTrainedModel) -> list[str]:
    """Frequencies that were rounded to 16 bits: from_pretrained keeps them in fp32, `model.to(dtype)` does not."""
    short = {torch.float16, torch.bfloat16}
    return [name for name, buffer in model.named_buffers() if name.endswith("inv_freq") and buffer.dtype in short]


def _check_head(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for a model without logits of words."""
    logits = probe(model, model.get_input_embeddings().weight)
    size = model.config.get_text_config(decoder=True).vocab_size
    if model.get_output_embeddings() is None and logits.shape[-1] < size:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {logits.shape[-1]} numbers for each token, and its vocabulary has {size} "
            "words: it has no language-model head. Load it with AutoModelForCausalLM"
        )


def check_wrapper(whole: nn.Module, model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where `whole`, a PeftModel in evaluation mode, computes more than `model` in it."""
    words = model.get_input_embeddings().weight
    if is_peft_model(whole) and not torch.allclose(probe(whole, words), probe(model, words), rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"{type(whole).__name__} computes something else than the {type(model).__name__} in it, whose layers are "
            "what is evaluated here; merge it into the model (merge_and_unload), or use --model hf"
        )


# ---- the arguments beside an object ----

_WHILE_LOADING = "choose it in from_pretrained, where the model is loaded"
OF_REFERENCE = {
    "attn_implementation", "cache_dir", "force_download", "local_files_only", "low_cpu_mem_usage",
    "use_safetensors", "variant",
}  # fmt: skip
"""Arguments of from_pretrained that a reference is loaded with, where `pretrained` is an object."""
_IDLE = {
    "peft": "hand over the PeftModel, peft.PeftModel.from_pretrained(model, ADAPTER)",
    "delta": "add it to the weights, and hand over the sum",
    "revision": "load the model (and a tokenizer=...) in that revision, and hand them over",
    "gguf_file": "it is read in from_pretrained; name the folder of a tokenizer with tokenizer=...",
    "subfolder": "it is read in from_pretrained; name the folder of a tokenizer with tokenizer=...",
    **dict.fromkeys(
        """
        device_map parallelize max_memory max_memory_per_gpu max_cpu_memory offload_folder offload_buffers
        offload_state_dict quantization_config
        """.split(),  # noqa: SIM905  read more easily as a paragraph
        _WHILE_LOADING,
    ),
}


def cell_of_object(model: PreTrainedModel, cell: CellSpec, arguments: Mapping[str, Any]) -> CellSpec:
    """`cell` with the dtype of `model`, the object that it is of.

    arguments: those of lm_eval's `hf`. Raises ConfigError where one of them, or of the cell's, would do nothing.
    """
    named = cell.model.reference not in {None, REFERENCE_IN_MEMORY}
    for key, value in {**arguments, "revision": cell.model.revision}.items():
        fix = _IDLE.get(key) or (_WHILE_LOADING if key in OF_REFERENCE and not named else None)
        chosen = value not in (None, False, "") and not (key == "revision" and value == "main")
        if fix is not None and chosen:
            raise ConfigError(f"{key}={value}: does nothing to a model that was handed over loaded; {fix}")
    if cell.backend != "auto" and cell.weights.method == "none":
        raise ConfigError(f"backend={cell.backend}: does nothing to a model that was handed over loaded; drop it")
    _check_place(model, arguments.get("device"))
    own = str(model.dtype).removeprefix("torch.")
    if cell.model.dtype not in {"auto", own}:
        raise ConfigError(
            f"dtype={cell.model.dtype}: the model was handed over in {own}, and is not converted here; load it with "
            f"from_pretrained(..., dtype=torch.{cell.model.dtype}), or leave dtype out"
        )
    return cell.model_copy(update={"model": cell.model.model_copy(update={"dtype": own})})


def named_tokenizer(value: Any, model: PreTrainedModel | None) -> Any:
    """The tokenizer, or its folder or name, as `hf` takes it; that of an object where none was given.

    Raises ConfigError for what is no tokenizer, and where an object does not say where its own is.
    """
    if value is None and model is not None:
        if not model.name_or_path:
            raise ConfigError(
                "tokenizer: the model that was handed over does not say where its own is (its name_or_path is empty); "
                "add tokenizer=..., a tokenizer of transformers, or its folder or hub name"
            )
        return model.name_or_path
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, (str, PreTrainedTokenizer, PreTrainedTokenizerFast)):
        return value
    held = ". It has one: hand over its .tokenizer" if hasattr(value, "tokenizer") else ""
    raise ConfigError(
        f"tokenizer: an object of the class {type(value).__name__} was given; expected a tokenizer of transformers, or "
        f"its folder or hub name{held}"
    )


def _check_place(model: PreTrainedModel, device: Any) -> None:
    if device is None:
        return
    wanted, held = torch.device(str(device)), model.device
    if wanted.type != held.type or (wanted.index or 0) != (held.index or 0):
        raise ConfigError(
            f"device={device}: the model was handed over on {held}, and is not moved here; hand over "
            f"model.to({str(device)!r}), or leave device out"
        )
