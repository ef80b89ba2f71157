"""Whether the evaluated model is one that its pivot's model was quantized to, by what its checkpoint may have done.

Knows the names of quantization methods, and nothing of how their files look.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from intactkv_eval.assemble.awq_basis import MAY_BE_SCALED
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.capture import embedding_hash, embedding_sample
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.same_weights import Nearest, Rules, check_same
from intactkv_eval.pivot.weight_sample import INPUT, weight_sample
from intactkv_eval.weights.formats import intactkv

# Whose groups lie along the rows of a matrix, of those that transformers reads; HQQ's, for one, may lie across them.
_ALONG_ROWS = {"bitsandbytes", "fp8", "fbgemm_fp8", "torchao", "compressed-tensors"}
_TO_NEAREST = {"bitsandbytes", "fp8", "fbgemm_fp8"}
_GROUP = 16  # what group sizes are multiples of, where groups of neighbours are looked at


class Compared(NamedTuple):
    """residual: the largest relative error of a quantized matrix, None where there is none. unscaled: nothing sampled
    is scaled against the reference.
    """

    residual: float | None = None
    unscaled: bool = False


def check_reference(
    pivot: PivotKV, model: PreTrainedModel, cell: CellSpec, quantization: Mapping[str, Any] | None
) -> Compared:
    """How the weights of `model` are those of the pivot's.

    Raises PivotError, with the tensor and the figure, where `model` is made from another one.
    """
    rules = rules_of(quantization)
    found = weight_sample(model)
    padded = pivot.logits.shape[-1] != model.get_input_embeddings().weight.shape[0]
    if not pivot.weights or not (padded or rules.words or not found[f"{INPUT}.weight"].plain):
        pivot.check_embeddings(embedding_hash(model), embedding_sample(model))
    if not pivot.weights:
        return Compared()  # a file of an earlier release
    named = f"the model of {cell.pivot.source} ({pivot.fingerprint.model})"
    if cell.model.reference is not None:
        named = f"reference={cell.model.reference}"
    if rules.scaled:
        with suppress(PivotError):
            plain = rules._replace(scaled=False)
            return Compared(check_same(found, pivot.weights, plain, cell.model.pretrained, named), unscaled=True)
    residual = check_same(found, pivot.weights, rules, cell.model.pretrained, named)
    return Compared(residual, unscaled=not rules.scaled)


def rules_of(quantization: Mapping[str, Any] | None) -> Rules:
    """What a checkpoint may have done to the weights by what it says of itself; one that says nothing may be GGUF."""
    if quantization is None:
        return Rules(nearest="fine", dequantized=True, words=True)
    method, scaled = str(quantization["method"]), writer_of(quantization) in MAY_BE_SCALED
    if "bits" not in quantization:
        nearest: Nearest = "all" if method in _TO_NEAREST else None
        return Rules(scaled, method in _ALONG_ROWS, None, nearest, dequantized=True)
    size = quantization.get("group_size")
    natural = not quantization.get("act_order") or quantization.get("static_groups")
    along = isinstance(size, int) and (size < 0 or (bool(natural) and size % _GROUP == 0))
    bits = None if quantization.get("mixed") else int(quantization["bits"])
    rounded = along and not scaled and _job(quantization).get("method") == "rtn"
    return Rules(scaled, along, bits, "all" if rounded else None)


def writer_of(quantization: Mapping[str, Any]) -> str:
    """What made it: the format's writer; of our own checkpoints the method, where the format is none else's."""
    own = quantization["method"] == intactkv.NAME
    return str(_job(quantization).get("method", intactkv.NAME) if own else quantization["method"])


def _job(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `intactkv quantize` was asked, empty for a checkpoint of others."""
    job: Mapping[str, Any] = (quantization.get("made") or {}).get("job") or {}
    return job
