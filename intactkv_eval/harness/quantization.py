"""What a checkpoint says of its own quantization, and who reads it: we natively, or transformers."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from intactkv_eval.errors import CheckpointError
from intactkv_eval.model.linear import backends_of
from intactkv_eval.model.packed import LAYOUT
from intactkv_eval.pivot.weight_sample import kinds_of_codes
from intactkv_eval.weights.checkpoint import quantization_beside
from intactkv_eval.weights.formats import Format, format_of

RECORD = "intactkv_quantize"
"""The key of a checkpoint's config.json under which `intactkv quantize` tells how it was made."""


class Quantization(NamedTuple):
    """summary: what a run records, None for a checkpoint in full precision. layout: the format, if read natively."""

    summary: dict[str, Any] | None
    layout: Format | None


def quantization_in_memory(model: PreTrainedModel) -> Quantization:
    """Of a loaded model: what it was read as by us, what transformers says in its config, or what its layers show."""
    said = getattr(model.config, "quantization_config", None)
    layout: Format | None = getattr(model, LAYOUT, None)
    if said is not None:
        method = str((said if isinstance(said, dict) else said.to_dict()).get("quant_method"))
        return Quantization({"method": method.lower().rpartition(".")[2]}, None)
    if not backends_of(model):
        kinds = kinds_of_codes(model)
        return Quantization({"method": f"layers of {', '.join(sorted(kinds))}"} if kinds else None, None)
    if layout is None:
        return Quantization({"method": "packed layers"}, None)
    made = getattr(model.config, RECORD, None)
    return Quantization({**layout.summary(), "made": made} if made else layout.summary(), layout)


def read_quantization(pretrained: str, config: PretrainedConfig) -> Quantization:
    """Of a checkpoint by its config, or by the separate file of older releases (looked for in folders only).

    Raises CheckpointError for a variant of a known format that is not read natively, and for a damaged record of ours.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        found = quantization_beside(Path(pretrained)) if Path(pretrained).is_dir() else None
    else:
        found = said if isinstance(said, dict) else said.to_dict()
    method = str((found or {}).get("quant_method", "")).lower().rpartition(".")[2]
    if found is None or not method or method == "gguf":
        return Quantization(None, None)  # GGUF is dequantized by transformers when it is loaded
    layout = format_of({**found, "quant_method": method})
    summary = layout.summary() if layout else {"method": method}
    made = getattr(config, RECORD, None)
    if made is not None and not _is_record(made):
        raise CheckpointError(
            f"{pretrained}: config.json says {RECORD}={str(made)[:80]!r}; expected what `intactkv quantize` "
            "writes there: remove the key, or make the checkpoint anew"
        )
    return Quantization({**summary, "made": made} if made else summary, layout)


def _is_record(made: object) -> bool:
    if not isinstance(made, dict):
        return False
    parts = [made.get(key, {}) for key in ("job", "source", "formulas")]
    return all(isinstance(part, dict) for part in parts) and all(type(one) is int for one in parts[-1].values())
