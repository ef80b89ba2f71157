"""Whether what a cell asks for belongs together: checkpoint, pivot, codebook and cache, each error with its fix.

Knows cells and loaded models; changes neither.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.assemble.reference_check import Compared, check_reference
from intactkv_eval.assemble.rotated_basis import check_rotated_embeddings
from intactkv_eval.cell.formulas import REVISIONS, VICUNA
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.chat.bos_text import bos_changes_tokens
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.inference.grouped_kv_probe import check_groups
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.model.linear import quantized_digest
from intactkv_eval.pivot.capture import computed, embedding_hash, embedding_sample, fingerprint_of
from intactkv_eval.pivot.kv import ROUNDING, Computed, PivotKV
from intactkv_eval.pivot.tokens import check_vocabulary
from intactkv_eval.weights.input_transform import Rotation

# Of SmolLM2 eager and sdpa attention differ by 0.025 in bf16 and 1e-6 in fp32; another activation by 0.4 to 0.6, and
# a tenth of the RoPE base by 0.09 behind seven tokens (python tests/stress/config_noise.py MODEL).
_NOISE = {torch.bfloat16: 2**-4, torch.float16: 2**-4, torch.float32: 2**-6, torch.float64: 2**-6}

IN_MEMORY = "in-memory"
"""What stands for the name of a model that was given loaded."""
REFERENCE_IN_MEMORY = "in-memory reference"
"""What stands for the name of a reference that was given loaded."""


def check_origin(cell: CellSpec, quantization: dict[str, Any] | None, needs_pivot: bool) -> None:
    """A checkpoint that is quantized already is no source of a full-precision pivot, and is not quantized again."""
    packed = quantization is not None and "bits" in quantization
    if cell.backend != "auto" and cell.weights.method == "none" and not packed:
        raise ConfigError(f"backend={cell.backend}: does nothing without quantized weights; drop it")
    if quantization is None:
        return
    method = quantization["method"]
    if cell.weights.method != "none":
        raise ConfigError(
            f"{cell.model.pretrained} is quantized already ({method}): drop weights={cell.weights.method}"
        )
    if cell.weights.rotate:
        raise ConfigError(f"{cell.model.pretrained} is quantized already ({method}): it cannot be rotated; drop rotate")
    if cell.activations.bits < 16 and (cell.model.pretrained == IN_MEMORY or "activations" in quantization):
        raise ConfigError(
            f"act_bits: {cell.model.pretrained} ({method}) says itself how its activations are quantized, or is a "
            "loaded model whose quantized layers are not changed; drop act_bits and what belongs to it"
        )
    if needs_pivot:
        raise PivotError(
            f"{cell.model.pretrained} is quantized ({method}): name the full-precision model it was made from with "
            "reference=..., or a captured PivotKV file with pivot=FILE.safetensors"
        )


def check_belongs(
    pivot: PivotKV,
    model: PreTrainedModel,
    cell: CellSpec,
    quantization: dict[str, Any] | None,
    rotation: Rotation | None,
) -> tuple[PivotKV, Compared]:
    """A PivotKV from elsewhere must be this model's: same dtype, and same weights, but for what quantizing changes.

    Then its tokens must be words of this model, and its tensors such as the model computes for them: the same ones, but
    for rounding, where it is full. Returns it with as many logits as the model gives, whose vocabulary may have been
    padded, and what the comparison of the weights gave.
    """
    same_model = cell.model.reference is None and quantization is None
    found = fingerprint_of(model, cell.model.revision) if same_model else None
    compared = Compared()
    if rotation is not None:
        check_rotated_embeddings(pivot, model, rotation)
    elif not same_model:
        compared = check_reference(pivot, model, cell, quantization)
    pivot.check_matches(
        dtype=str(model.dtype).removeprefix("torch."),
        basis=None if pivot.fingerprint.calibrated else "plain",
        weight_hash=found.weight_hash if found else None,
    )
    check_vocabulary(pivot.token_ids, model.get_input_embeddings().weight.shape[0])
    own = computed(model, pivot.token_ids)
    if not same_model and rotation is None and pivot.weights:
        pivot = pivot.with_logits_of(own.logits)
    pivot.check_fits(*own)
    if same_model:
        _check_computed(pivot, own, cell)
    return pivot, compared


def _check_computed(pivot: PivotKV, own: Computed, cell: CellSpec) -> None:
    """The same weights compute something else where the config was changed: RoPE, a norm, an activation."""
    trained = pivot.fingerprint.calibrated is not None
    held = Computed(own.keys, own.values, pivot.logits) if trained else Computed(pivot.keys, pivot.values, pivot.logits)
    worst = computed_difference(held, own)
    bound = _NOISE[own.logits.dtype]
    if worst > bound:
        raise PivotError(
            f"{cell.pivot.source}: these weights compute other {'logits' if trained else 'KV'} for its tokens, which "
            f"differ by {worst:.2g} of their size (rounding: at most {bound:.2g}). The config of "
            f"{cell.model.pretrained} is not what it was at the capture (RoPE, norms, activation?). Capture it anew: "
            "intactkv capture"
        )


def computed_difference(found: Computed, expected: Computed) -> float:
    """The largest of those of keys, values and logits: relative to each layer's size, root mean square over layers.

    A pivot's values may be so small in one layer that it holds little else than rounding.
    """
    kinds = ((found.keys, expected.keys), (found.values, expected.values), ((found.logits,), (expected.logits,)))
    return max(_difference(one, other) for one, other in kinds)


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    shares = []
    for one, other in zip(found, expected, strict=True):
        right = other.cpu().double()
        shares.append((one.cpu().double() - right).norm() / right.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return float(torch.stack(shares).square().mean().sqrt())


def check_calibrated(pivot: PivotKV, model: PreTrainedModel, cell: CellSpec, tokenizer: Any) -> None:
    """Rows that were trained for one quantized model do not go in front of another, unless the cell says so.

    Rows in a basis of their own never do: there they would be numbers without a meaning. Raises PivotError, also for
    rows that were trained on conversations in other tokens, and ConfigError for an argument that does nothing.
    """
    trained = pivot.fingerprint.calibrated
    if trained is None:
        if cell.pivot.transfer:
            raise ConfigError(f"pivot_transfer: does nothing, {cell.pivot.source} is not calibrated; drop it")
        return
    if cell.pivot.chat_template == VICUNA and "targets" not in trained.settings:
        raise PivotError(
            f"{cell.pivot.source} was made by the formula calibration.vicuna of revision 1, now "
            f"{REVISIONS['calibration.vicuna']}: Vicuna's targets are the released ones now, so train it anew"
        )
    _check_conversations(pivot, cell.pivot.source, tokenizer)
    same = trained.quantized == quantized_digest(model)
    if same and cell.pivot.transfer:
        raise ConfigError(f"pivot_transfer: does nothing, {cell.pivot.source} was calibrated for this model; drop it")
    if same or (cell.pivot.transfer and pivot.fingerprint.basis == "plain"):
        return
    fix = "pivot_transfer=true allows it" if pivot.fingerprint.basis == "plain" else "its basis is that model's alone"
    raise PivotError(
        f"{cell.pivot.source} was calibrated for {trained.cell}, and this is another quantized model ({fix}); "
        "calibrate for this one: intactkv calibrate"
    )


def _check_conversations(pivot: PivotKV, source: str, tokenizer: Any) -> None:
    """Raise PivotError for a PivotKV that was trained on conversations in other tokens than today's."""
    trained = pivot.fingerprint.calibrated
    if trained is not None and "bos" not in trained.settings and bos_changes_tokens(tokenizer):
        raise PivotError(
            f"{source} was made by the formula chat of revision 1, now {REVISIONS['chat']}: the BOS of its "
            "conversations was tokenized as text, and this tokenizer adds it itself now; train it anew"
        )


def check_kept_rows(cell: CellSpec, pivot: int) -> None:
    """Each switch of rows that are left alone must leave other rows alone than without it."""
    keep = cell.kv.sink_tokens
    if not cell.pivot.intact or keep == 0:
        return
    if not cell.kv.quantize_pivot and keep <= pivot:
        raise ConfigError(f"kv_sink_tokens={keep}: does nothing, the {pivot} intact pivot rows are exempt already")
    if cell.kv.quantize_pivot and keep >= pivot:
        raise ConfigError(
            f"kv_quantize_pivot=true: does nothing, kv_sink_tokens={keep} leaves all {pivot} pivot rows alone"
        )


def check_cache(pivoted: PivotedModel) -> None:
    """The cache's quantizer must fit the model and the rows that it is given."""
    if pivoted.codebook is not None:
        pivoted.codebook.check_calibrated(pivoted.token_ids, pivoted.exempt)
    if pivoted.kv_quantizer is not None and pivoted.kv_quantizer.in_groups:
        check_groups(pivoted)


def check_codebook(
    codebook: Codebook, model: PreTrainedModel, cell: CellSpec, quantization: dict[str, Any] | None
) -> None:
    """Raise ConfigError for a codebook of another model, or without a range for each channel of its keys.

    In full precision and in the same dtype the weights are compared, else the embeddings.
    """
    if cell.weights.rotate:
        raise ConfigError("kv_scheme=pre_rope: its codebook was calibrated on values that are not rotated; drop rotate")
    of, dtype = codebook.fingerprint, str(model.dtype).removeprefix("torch.")
    if cell.model.reference is None and quantization is None and of.dtype == dtype:
        same = of.weight_hash == fingerprint_of(model, cell.model.revision).weight_hash
    else:
        same = of.embeddings_differ(embedding_hash(model), embedding_sample(model)) <= ROUNDING
    if not same:
        raise ConfigError(
            f"kv_codebook={cell.kv.codebook}: calibrated on {of.model} ({of.dtype}), whose weights are not those of "
            f"{cell.model.pretrained}; calibrate on the full-precision model of this cell: intactkv kv-codebook"
        )
    codebook.check_fits(computed(model, (0,)).keys)
