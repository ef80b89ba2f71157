"""Where a model's config says that the checkpoint is quantized: under which key, and in which of its parts.

transformers, AutoGPTQ and AutoAWQ write `quantization_config`, compressed-tensors before 10/2024 `compression_config`;
wrappers of a language model may have either in the config of their text decoder. Knows no format.
"""

from typing import Any

from transformers import PretrainedConfig

_OLDER = "compression_config"
_KEYS = ("quantization_config", _OLDER)
_SPARSITY = "sparsity_config"


def declared_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """What `config`, or the config of its text decoder, says of the checkpoint's quantization; None where nothing."""
    for part in _parts(config):
        for key in _KEYS:
            said = getattr(part, key, None)
            if said is None:
                continue
            found: dict[str, Any] = dict(said) if isinstance(said, dict) else said.to_dict()
            if key == _OLDER:
                found = _flat(found)
            beside = getattr(part, _SPARSITY, None)
            return {_SPARSITY: beside, **found} if beside else found
    return None


def _flat(said: dict[str, Any]) -> dict[str, Any]:
    """What stands under the older key; its two parts, of which the second is `sparsity_config`, may be apart."""
    inner = said.pop(_KEYS[0], None)
    return {"quant_method": "compressed-tensors", **said, **(inner if isinstance(inner, dict) else {})}


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, changed in place so that it says nothing of a quantization; transformers' quantizers let it be."""
    for part in _parts(config):
        for key in _KEYS:
            if hasattr(part, key):
                delattr(part, key)
    return config


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    text = config.get_text_config(decoder=True)
    return [config] if text is config else [config, text]
