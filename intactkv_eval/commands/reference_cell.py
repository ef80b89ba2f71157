"""The full-precision model beside a quantized cell: the same pivot tokens, and hidden states in the same basis."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from intactkv_eval.assemble.checkpoint_info import read_quantization
from intactkv_eval.cell.spec import ActivationSpec, CellSpec, pivot_kind
from intactkv_eval.model.input_transforms import apply_input_transforms
from intactkv_eval.pivot.basis import to_rotated
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.same_weights import Rules, check_same
from intactkv_eval.pivot.weight_sample import Sampled
from intactkv_eval.quantize.rotation import rotate


def without_reference(arguments: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A cell whose pivot comes from a file has no use for `reference`; what stands beside that cell has."""
    if pivot_kind(arguments.get("pivot")) == "kv_file":
        rest = {key: value for key, value in arguments.items() if key != "reference"}
        return rest, arguments.get("reference")
    return arguments, None


def full_arguments(cell: CellSpec, reference: str | None = None) -> dict[str, Any]:
    """The arguments of IntactKVLM for it; a file's tokens are captured anew, since its rows may be trained ones.

    reference: the full-precision model, where the cell itself names none.
    """
    source, reference = cell.pivot.source, cell.model.reference or reference
    if cell.pivot.kind == "kv_file":
        source = f"tokens:{'+'.join(map(str, PivotKV.load(Path(source)).token_ids))}"
    chosen = {"pretrained": reference or cell.model.pretrained, "dtype": cell.model.dtype}
    revision = "main" if reference else cell.model.revision
    return {**chosen, "revision": revision, "pivot": source, "chat_template": cell.pivot.chat_template}


def check_same_source(cell: CellSpec, full: PivotKV, reference: str | None) -> None:
    """Raise PivotError unless `full`, captured from `reference`, is of the model that the cell's pivot file is of.

    The cell itself compares that file with the quantized model, and nothing with the reference beside it.
    """
    if reference is None or cell.pivot.kind != "kv_file":
        return
    pivot = PivotKV.load(Path(cell.pivot.source))
    if not pivot.weights:
        return
    found = {name: Sampled(numbers, plain=True) for name, numbers in full.weights.items()}
    named = f"{pivot.fingerprint.model}, whose pivot is in {cell.pivot.source}"
    check_same(found, pivot.weights, Rules(), f"reference={reference}", named)


def rotation_seed(cell: CellSpec) -> int | None:
    """How the hidden states of the cell's model are turned, None where they are not."""
    if cell.weights.rotate:
        return 0
    config = AutoConfig.from_pretrained(cell.model.pretrained, revision=cell.model.revision)
    rotation = read_quantization(cell.model.pretrained, config, cell.model.revision).rotation
    return None if rotation is None else rotation.seed


def turned_alike(model: PreTrainedModel, pivot: PivotKV, seed: int | None) -> PivotKV:
    """Turn the full-precision `model`, in place, as the cell's is by `seed`; its pivot in that basis."""
    if seed is None:
        return pivot
    apply_input_transforms(model, rotate(model, seed), ActivationSpec())
    return to_rotated(pivot)
