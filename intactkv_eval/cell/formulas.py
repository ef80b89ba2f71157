"""The revision of every formula that decides a figure, so that figures of two revisions are never mixed.

A revision goes up whenever the same cell would give other numbers than before. Runs record the revisions of the
formulas that they used; a sweep's keys, the identity of a response cache, and files of pivots, codebooks and
checkpoints hold them too. What was written before revisions were recorded counts as revision 1. Knows no torch.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from intactkv_eval.cell.spec import CellSpec, formula_of

REVISIONS: Mapping[str, int] = MappingProxyType(
    {
        "weights.rtn": 1,
        "weights.gptq": 2,  # 2: inputs that are never used are treated as in the released code
        "weights.gptq.small_groups": 2,  # 2: ranges are read from the weights as they stood when their block began
        "weights.awq": 1,
        "weights.omniquant": 1,
        "symmetric.gptq": 1,
        "symmetric.quarot": 2,  # 2 of these three: each method's own range; before, GPTQ's was taken
        "symmetric.omniquant": 2,
        "symmetric.awq": 2,
        "rotation": 1,
        "activations.token": 1,
        "activations.tensor": 1,
        "kv.token_head": 2,  # 2: the released code's whole-numbered zero point; before, a float minimum
        "kv.channel_key": 2,  # 2: the released code's residual rows
        "kv.pre_rope": 1,
        "codebook": 1,
        "pivot": 1,
        "chat": 2,  # 2: BOS is added by the tokenizer; before, it was tokenized as text where a chat template writes it
        "calibration": 1,
        "calibration.vicuna": 2,  # 2: the released tokens and targets of conversations; before, FastChat's template
    }
)
VICUNA = "vicuna_v1.1"
"""The chat template of the conversations that IntactKV's released code trains on."""
_BLOCK = 128
"""Columns that GPTQ quantizes before it applies their errors to the columns behind them."""


def current(names: Iterable[str]) -> dict[str, int]:
    """Today's revisions of the formulas with these names."""
    return {name: REVISIONS[name] for name in sorted(names)}


def formulas_of(
    cell: CellSpec, quantization: Mapping[str, Any] | None = None, is_calibrated: bool = False
) -> dict[str, int]:
    """The formulas that decide the figures of a cell, with their revisions.

    Args:
        cell: The cell. Formulas that it applies while it runs have today's revision.
        quantization: What the checkpoint says of its own quantization. A checkpoint of ours says which revisions it
            was made by; one that says none was made by revision 1.
        is_calibrated: Whether the pivot's KV was trained.
    """
    made = (quantization or {}).get("made") or {}
    return {**current(names_of_cell(cell, is_calibrated)), **formulas_of_checkpoint(made)}


def calibration_name(is_vicuna: bool) -> str:
    """The formula by which a pivot's KV is trained, on Vicuna's conversations or on others."""
    return "calibration.vicuna" if is_vicuna else "calibration"


def names_of_cell(cell: CellSpec, is_calibrated: bool = False) -> list[str]:
    """The formulas that a cell applies while it runs, whatever its checkpoint was made by."""
    weights, names = cell.weights, []
    if weights.method != "none":
        names.append(f"weights.{weights.method}")
        if weights.symmetric:
            names.append(f"symmetric.{weights.symmetric_formula}")
    if weights.rotate:
        names.append("rotation")
    if cell.activations.bits < 16:
        names.append(f"activations.{cell.activations.scheme}")
    if cell.kv.bits < 16:
        names.append(f"kv.{cell.kv.scheme}")
    if is_calibrated:
        names.append(calibration_name(cell.pivot.chat_template == VICUNA))
    return names


def names_of_prompts(cell: CellSpec, is_chat: bool) -> list[str]:
    """The formula of chat prompts where a cell, or a task of it, has such.

    Whether their revisions differ is the tokenizer's to tell: a run records `chat` only where they do.
    """
    return ["chat"] if is_chat or cell.pivot.source == "prompt" or cell.pivot.chat_template else []


def names_of_job(job: Mapping[str, Any]) -> list[str]:
    """The formulas by which a checkpoint is made. job: as `intactkv quantize` writes it into the checkpoint."""
    method, options = job.get("method"), job.get("options") or {}
    names = [f"weights.{method}"]
    size = job.get("group_size") or -1
    if method == "gptq" and 0 < size < _BLOCK and not options.get("static_groups"):
        names.append("weights.gptq.small_groups")
    if job.get("symmetric"):
        names.append(f"symmetric.{formula_of(str(method), bool(job.get('rotate')))}")
    if job.get("rotate"):
        names.append("rotation")
    return [name for name in names if name in REVISIONS]


def formulas_of_checkpoint(made: Mapping[str, Any]) -> dict[str, int]:
    """The formulas by which a checkpoint of ours was made, with the revisions that it says.

    Args:
        made: What the checkpoint's config says of how it was made; empty for a checkpoint of others.

    Raises:
        ValueError: A revision is no whole number.
    """
    return recorded(names_of_job(made.get("job") or {}), made.get("formulas")) if made else {}


def recorded(names: Iterable[str], found: Any) -> dict[str, int]:
    """The revisions of the formulas `names` in a record; 1 for what it does not name.

    Raises:
        ValueError: A revision is no whole number.
    """
    said = found if isinstance(found, Mapping) else {}
    revisions = {name: said.get(name, 1) for name in sorted(names)}
    for name, revision in revisions.items():
        if type(revision) is not int:
            raise ValueError(f"formula {name}: revision {str(revision)[:80]!r} is no whole number")
    return revisions


def stale(found: Mapping[str, int]) -> list[str]:
    """The formulas whose revision is not today's, each as a phrase for people."""
    return [
        f"{name} of revision {revision}, now {REVISIONS.get(name, 'gone')}"
        for name, revision in sorted(found.items())
        if revision != REVISIONS.get(name)
    ]
