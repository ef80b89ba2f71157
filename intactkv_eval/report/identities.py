"""Which cell another one is measured against: the identity of its baseline, and of its full precision.

Knows no runs and no figures.
"""

from dataclasses import replace

from intactkv_eval.cell.spec import ActivationSpec, KVSpec, WeightSpec
from intactkv_eval.report.collect import Identity

BOS = "bos"  # stands for every source of tokens; which these are is compared by themselves


def comparable(identity: Identity, wanted: Identity) -> Identity:
    """An identity as it is compared with `wanted`: named by its tokens, its weights' hash only where that is known."""
    found = by_tokens(identity)
    return replace(found, source_hash=wanted.source_hash and found.source_hash)


def by_tokens(identity: Identity) -> Identity:
    """Tokens that are computed are the same wherever their ids come from: a name, a list or a file."""
    pivot = identity.cell.pivot
    if pivot.intact:
        return identity
    pivot = pivot.model_copy(update={"source": BOS})
    return replace(identity, cell=identity.cell.model_copy(update={"pivot": pivot}))


def by_job(identity: Identity) -> Identity:
    """Whatever checkpoint it is of: how that was made, but for the pivot that it was calibrated behind."""
    model = identity.cell.model.model_copy(update={"pretrained": ""})
    cell = identity.cell.model_copy(update={"model": model})
    return replace(identity, cell=cell, source_hash=None, checkpoint=None, behind=None)


def baseline_of(identity: Identity) -> Identity:
    """The same model, the same tokens in front, computed by itself."""
    cell = identity.cell
    pivot = cell.pivot.model_copy(update={"intact": False, "source": BOS, "transfer": False})
    model = cell.model.model_copy(update={"reference": None})
    kv = cell.kv.model_copy(update={"quantize_pivot": False})  # of intact rows alone
    formulas = tuple(one for one in identity.formulas if not one[0].startswith("calibration"))  # of the intact rows
    cell = cell.model_copy(update={"pivot": pivot, "model": model, "kv": kv})
    return replace(identity, cell=cell, formulas=formulas)


def full_precision_of(identity: Identity) -> Identity:
    """Nothing quantized. A checkpoint quantized elsewhere is compared with its reference, whose weights are others."""
    baseline = baseline_of(identity).cell
    reference = identity.cell.model.reference or identity.made_from
    other = {"pretrained": reference, "revision": "main"} if reference else {}
    model = baseline.model.model_copy(update=other)
    cell = baseline.model_copy(
        update={
            "weights": WeightSpec(),
            "kv": KVSpec(),
            "activations": ActivationSpec(),
            "backend": "auto",
            "model": model,
        }
    )
    source = None if reference else identity.source_hash
    return Identity(cell=cell, hf_arguments=identity.hf_arguments, source_hash=source)
