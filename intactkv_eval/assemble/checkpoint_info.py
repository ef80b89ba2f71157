"""What a checkpoint says of its own quantization, and who reads it: we natively, or transformers."""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.compat.transformers_api import file_of
from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.declared import declared_quantization
from intactkv_eval.model.linear import backends_of, quantized_layers
from intactkv_eval.model.packed import LAYOUT
from intactkv_eval.pivot.weight_sample import kinds_of_codes
from intactkv_eval.weights.checkpoint import quantization_beside
from intactkv_eval.weights.formats import NAMES, Format, compressed_tensors, format_of, gptq
from intactkv_eval.weights.formats.spellings import name_of
from intactkv_eval.weights.input_transform import Rotation

RECORD = "intactkv_quantize"
"""The key of a checkpoint's config.json under which `intactkv quantize` tells how it was made."""


class CheckpointInfo(NamedTuple):
    """summary: what a run records, None for a checkpoint in full precision. layout: the format, if read natively.

    idle: the config has a part that describes a quantization, and it quantizes nothing.
    """

    summary: dict[str, Any] | None
    layout: Format | None
    idle: bool = False

    @property
    def rotation(self) -> Rotation | None:
        """How the checkpoint's model was rotated, None where it was not."""
        return None if self.layout is None else self.layout.rotation


def quantization_in_memory(model: PreTrainedModel) -> CheckpointInfo:
    """Of a loaded model: what it was read as by us, what transformers says in its config, or what its layers show."""
    said = declared_quantization(model.config)
    layout: Format | None = getattr(model, LAYOUT, None)
    if said is not None:
        return CheckpointInfo({"method": _method(said)}, None)
    if not backends_of(model):
        kinds = kinds_of_codes(model)
        return CheckpointInfo({"method": f"layers of {', '.join(sorted(kinds))}"} if kinds else None, None)
    if layout is None:
        return CheckpointInfo({"method": "packed layers"}, None)
    made = getattr(model.config, RECORD, None)
    return CheckpointInfo({**layout.summary(), "made": made} if made else layout.summary(), layout)


def read_quantization(pretrained: str, config: PretrainedConfig, revision: str = "main") -> CheckpointInfo:
    """Of a checkpoint by its config, and by the separate file that older releases wrote beside it.

    Args:
        pretrained: A folder, or a name on the hub, whose files are looked for in the local cache when offline.
        config: Its config, as transformers reads it.
        revision: Of the hub.

    Raises:
        CheckpointError: A variant of a known format that is not read natively, two descriptions that contradict each
            other, or a damaged record of ours.
    """
    found = _described(pretrained, config, revision)
    method = _method(found or {})
    if found is None or not method or method == "gguf":
        return CheckpointInfo(None, None)  # GGUF is dequantized by transformers when it is loaded
    if method == compressed_tensors.NAME and compressed_tensors.is_idle(found):
        return CheckpointInfo(None, None, idle=True)
    layout = format_of({**found, "quant_method": method})
    summary = layout.summary() if layout else {"method": method}
    made = getattr(config, RECORD, None)
    if made is not None and not _is_record(made):
        raise CheckpointError(
            f"{pretrained}: config.json says {RECORD}={str(made)[:80]!r}; expected what `intactkv quantize` "
            "writes there: remove the key, or make the checkpoint anew"
        )
    return CheckpointInfo({**summary, "made": made} if made else summary, layout)


def as_held(summary: dict[str, Any] | None, model: PreTrainedModel) -> dict[str, Any] | None:
    """`summary` with act-order where the layers of the loaded model have it, though the config may not say so."""
    if summary is None or not any(layer.is_ordered for layer in quantized_layers(model).values()):
        return summary
    return {key: value for key, value in summary.items() if key != "static_groups"} | {"act_order": True}


def _described(pretrained: str, config: PretrainedConfig, revision: str) -> dict[str, Any] | None:
    """What config.json says, else the separate file; of GPTQ the version too, which config.json may leave out."""
    said = declared_quantization(config)
    if said is not None and (_method(said) != gptq.NAME or gptq.version_of(said) is not None):
        return said
    beside = quantization_beside(partial(file_of, pretrained, revision=revision))
    if said is None:
        return beside
    version = gptq.version_of(beside) if beside is not None and _method(beside) == gptq.NAME else None
    return said if version is None else {**said, "checkpoint_format": version}


def _method(found: Mapping[str, Any]) -> str:
    """The method that a description names, which GPTQModel's newest releases call `method`; "" where it names none."""
    name = name_of(found.get("quant_method") or found.get("method") or "")
    return NAMES.get(name, name)


def _is_record(made: object) -> bool:
    if not isinstance(made, dict):
        return False
    parts = [made.get(key, {}) for key in ("job", "source", "formulas")]
    return all(isinstance(part, dict) for part in parts) and all(type(one) is int for one in parts[-1].values())
