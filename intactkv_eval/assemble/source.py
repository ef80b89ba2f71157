"""ModelSource: where the models of a cell come from, and what is known of them before one is loaded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.assemble.checkpoint_info import CheckpointInfo
from intactkv_eval.chat.templates import ChatSettings

Loader = Callable[[str, str], PreTrainedModel]
"""(name or folder, revision) -> the model on its devices."""


@dataclass(frozen=True)
class ModelSource:
    """Where the models of a cell come from.

    Args:
        load: Loads `pretrained` and `reference`, each by its name and revision.
        config: The config of `pretrained`, as transformers reads it.
        tokenizer: The tokenizer of `pretrained`, with the cell's chat template.
        checkpoint: What the checkpoint says of its own quantization.
        modified: Names whose models are not what their files alone say (an adapter, a GGUF file, an object). No pivot
            is kept under these.
        chat: How the chat template is rendered.
    """

    load: Loader
    config: PretrainedConfig
    tokenizer: Any
    checkpoint: CheckpointInfo
    modified: frozenset[str] = frozenset()
    chat: ChatSettings = field(default_factory=ChatSettings)

    @property
    def vocabulary(self) -> int:
        """The number of words in the vocabulary of `pretrained`, by its config."""
        return int(self.config.get_text_config(decoder=True).vocab_size)
