"""How a cell is named in the first four columns of a table: model, weights, KV cache, pivot. Knows no figures."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import PurePath

from intactkv_eval.cell.spec import CellSpec, KVSpec
from intactkv_eval.report.collect import Identity, activations_label, symmetric_label


def labels_of(identities: Iterable[Identity]) -> dict[Identity, tuple[str, str, str, str]]:
    """The labels of each; where two would have the same, the name of the checkpoint or the weights' hash too."""
    labels = {identity: _labels(identity) for identity in identities}
    known: dict[tuple[str, ...], set[str | None]] = defaultdict(set)
    for identity, named in labels.items():
        known[named].add(identity.source_hash)
    for identity, (name, *others) in list(labels.items()):
        hashes = known[labels[identity]] - {None}
        if len(hashes) > 1 and identity.source_hash is not None:
            more = identity.cell.model.pretrained if identity.made_from else identity.source_hash[:8]
            labels[identity] = (f"{name} [{more}]", others[0], others[1], others[2])
    return labels


def weights_label(identity: Identity) -> str:
    """`fp`; method, bits and group (`rtn w4g64`); or how the checkpoint says it is quantized. Then the activations."""
    weights = identity.cell.weights
    stages = [*activations_label(identity.cell.activations), *(["rotated"] if weights.rotate else [])]
    if weights.method == "none":
        return " ".join([identity.checkpoint or "fp", *stages])
    group = "" if weights.group_size in {None, -1} else f"g{weights.group_size}"
    formula = symmetric_label(identity.symmetric_formula)
    return " ".join([f"{weights.method} w{weights.bits}{group}", *formula, *stages])


def pivot_label(cell: CellSpec) -> str:
    """`none`, or the source; `(computed)` marks the baseline of a pivot that is not BOS alone."""
    if cell.pivot.intact:
        return PurePath(cell.pivot.source).name
    return "none" if cell.pivot.source == "bos" else f"{PurePath(cell.pivot.source).name} (computed)"


def _labels(identity: Identity) -> tuple[str, str, str, str]:
    cell = identity.cell
    asked = [f"{key}={value}" for key, value in identity.hf_arguments]
    name = " ".join([PurePath(identity.made_from or cell.model.pretrained).name, *asked])
    return name, weights_label(identity), "16" if cell.kv.bits == 16 else _kv_label(cell.kv), pivot_label(cell)


def _kv_label(kv: KVSpec) -> str:
    sizes = f" g{kv.group_size} residual {kv.residual_length}" if kv.group_size is not None else ""
    kept = f" sink {kv.sink_tokens}" if kv.sink_tokens else ""
    turned = (" rotated" if kv.rotate else "") + (f" clip {kv.clip:g}" if kv.clip < 1 else "")
    return f"{kv.bits} {kv.scheme}{sizes}{kept}{turned}{' pivot too' if kv.quantize_pivot else ''}"
