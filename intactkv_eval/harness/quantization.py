"""What a checkpoint says of its own quantization, and who reads it: we natively, or transformers."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.model.linear import backends_of
from intactkv_eval.weights.checkpoint import checkpoint_folder, quantization_of
from intactkv_eval.weights.formats import Format, format_of


class Quantization(NamedTuple):
    """summary: what a run records, None for a checkpoint in full precision. layout: the format, if read natively."""

    summary: dict[str, Any] | None
    layout: Format | None


def quantization_in_memory(model: PreTrainedModel) -> dict[str, Any] | None:
    """What a loaded model says of its own quantization, or shows by its layers; None for one in full precision."""
    said = getattr(model.config, "quantization_config", None)
    if said is not None:
        return {"method": str((said if isinstance(said, dict) else said.to_dict()).get("quant_method"))}
    return {"method": "packed layers"} if backends_of(model) else None


def read_quantization(pretrained: str, revision: str, config: PretrainedConfig) -> Quantization:
    """Of a checkpoint by its config, or by the separate file of older releases.

    Raises CheckpointError for a variant of a known format that is not read natively.
    """
    said = getattr(config, "quantization_config", None)
    if said is None and not Path(pretrained).is_dir():
        return Quantization(None, None)  # the separate files are looked for in folders only
    found = said if isinstance(said, dict) else said.to_dict() if said is not None else None
    found = quantization_of(checkpoint_folder(pretrained, revision, weights=False), found) if found is None else found
    method = str((found or {}).get("quant_method", "")).lower().rpartition(".")[2]
    if found is None or not method or method == "gguf":
        return Quantization(None, None)  # GGUF is dequantized by transformers when it is loaded
    layout = format_of({**found, "quant_method": method})
    return Quantization(layout.summary() if layout else {"method": method}, layout)
