"""The source of a cell whose models are folders or hub ids, loaded by transformers on one device. Knows no lm_eval."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from intactkv_eval.assemble.chat_date import chat_settings
from intactkv_eval.assemble.checkpoint_info import CheckpointInfo, read_quantization
from intactkv_eval.assemble.load_errors import (
    auto_class_of,
    check_folder,
    check_layers,
    check_no_adapter,
    check_no_kernel,
    check_settings_file,
    check_words,
    loading,
)
from intactkv_eval.assemble.source import ModelSource
from intactkv_eval.assemble.tokenizer_check import check_tokenizer
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.model.checkpoint_loaders import CheckpointAutoModel, PackedAutoModel, StrictAutoModel
from intactkv_eval.model.declared import without_quantization
from intactkv_eval.model.devices import automatic_device, check_device
from intactkv_eval.pivot.tokens import use_chat_template


def open_source(cell: CellSpec, device: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Read what is known of a cell's models before one is loaded.

    Args:
        cell: The cell; its `pretrained` and `reference` are folders or hub ids.
        device: Where models go, in torch's words; the first GPU, or the CPU, if none is given.
        trust_remote_code: Whether the repository's own code may run.

    Returns:
        The source for `load_cell`.

    Raises:
        ConfigError: For a name that is not there, or a device that is not here.
        CheckpointError: For files that are damaged.
        UnsupportedModelError: For what is no language model.
    """
    check_device(device)
    name, revision = cell.model.pretrained, cell.model.revision
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with loading(f"pretrained={name!r}"):
        check_folder(name)
        check_no_adapter(name)
        check_layers(name, revision)
        check_settings_file(name, revision)
        check_tokenizer(name, revision)
        config = AutoConfig.from_pretrained(name, **options)
        auto_class = auto_class_of(name, config) or AutoModelForCausalLM
        checkpoint = take_quantization(name, config, revision)
        loader = checkpoint_loader(cell, config, checkpoint, auto_class)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        check_words(tokenizer, name, revision)
        if cell.pivot.chat_template:
            use_chat_template(tokenizer, cell.pivot.chat_template)
        chat = chat_settings(cell.pivot, tokenizer, {})
    place, dtype = device or automatic_device(), cell.model.dtype

    def load(name: str, revision: str) -> PreTrainedModel:
        with loading(repr(name)):
            check_folder(name)
            check_no_kernel(name, revision)
            model: PreTrainedModel = loader.from_pretrained(
                name,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                device_map={"": str(place)},
            )
        return model.eval()

    return ModelSource(load, config, tokenizer, checkpoint, chat=chat)


def take_quantization(name: str, config: PretrainedConfig, revision: str) -> CheckpointInfo:
    """What a checkpoint says of its quantization; taken out of `config` where transformers' quantizers must not act."""
    checkpoint = read_quantization(name, config, revision)
    if checkpoint.layout is not None or checkpoint.idle:
        without_quantization(config)
    return checkpoint


def checkpoint_loader(cell: CellSpec, config: Any, checkpoint: CheckpointInfo, auto_class: Any) -> CheckpointAutoModel:
    """What loads a cell's models, each by its name. config: of `pretrained`. auto_class: of transformers."""
    name = cell.model.pretrained
    special: dict[str, StrictAutoModel | PackedAutoModel] = {}
    if checkpoint.layout is not None:
        special[name] = PackedAutoModel(auto_class, checkpoint.layout, config, cell.backend)
    elif checkpoint.idle:
        special[name] = StrictAutoModel(auto_class, config)
    return CheckpointAutoModel(auto_class, special)
