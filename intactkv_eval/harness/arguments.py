"""The arguments of `hf` that IntactKVLM hands on; any other key that is no cell's is a mistake of the user."""

import inspect
from collections.abc import Mapping
from typing import Any

from lm_eval.models.huggingface import HFLM

from intactkv_eval.config import CELL_KEYS, unknown_key
from intactkv_eval.errors import ConfigError

# What hf hands on to transformers' from_pretrained.
_LOADING_KEYS = """
    attn_implementation cache_dir device_map force_download ignore_mismatched_sizes load_in_4bit load_in_8bit
    local_files_only low_cpu_mem_usage max_memory offload_buffers offload_state_dict token use_safetensors variant
""".split()  # noqa: SIM905  read more easily as a paragraph
_OWN_HF_KEYS = {"self", "kwargs", "pretrained", "revision", "dtype", "backend", "autogptq", "gptqmodel", "tp_plan"}
HF_KEYS = [key for key in inspect.signature(HFLM.__init__).parameters if key not in _OWN_HF_KEYS]


def check_hf_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise ConfigError for a key that neither `hf` nor from_pretrained takes, or that this class does not hand on."""
    if arguments.get("device_map") is not None and not arguments.get("parallelize"):
        raise ConfigError("device_map: hf reads it only with parallelize=True; add that, or choose device=...")
    known = [*HF_KEYS, *_LOADING_KEYS]
    for key in arguments:
        if key in {"autogptq", "gptqmodel", "tp_plan"}:
            raise ConfigError(f"{key}: not taken by intactkv; name a checkpoint with pretrained=..., or use --model hf")
        if key not in known:
            raise unknown_key(key, [*known, *CELL_KEYS])
