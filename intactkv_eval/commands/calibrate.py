"""What `intactkv calibrate` does: a cell and conversations in, the PivotKV that was trained for that cell out.

The full-precision model runs first and is freed, where its outputs fit the disk budget; then the quantized one is built
and frozen. What a killed run had reached lies beside the output, and the same command continues with it.
"""

import gc
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from intactkv_eval.assemble.chat_date import date_of, moment_of_run
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.chat.bos_text import bos_changes_tokens
from intactkv_eval.chat.conversations import Conversations, load_conversations
from intactkv_eval.chat.messages import waits
from intactkv_eval.chat.vicuna import is_vicuna
from intactkv_eval.commands.answer_questions import with_answers
from intactkv_eval.commands.reference_cell import (
    check_same_source,
    full_arguments,
    rotation_seed,
    turned_alike,
    without_reference,
)
from intactkv_eval.compat.tensor_parts import weight_hash
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.hf_arguments import checked_cell
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.linear import quantized_digest
from intactkv_eval.pivot.identity import Calibrated
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.files import check_writable, locked
from intactkv_eval.training.distributed import Ranks
from intactkv_eval.training.examples import Example, digest_of_examples, examples_of
from intactkv_eval.training.run_state import RunState
from intactkv_eval.training.student import Quality, Student, check_recompute
from intactkv_eval.training.teacher import KeptTargets, bytes_of, full_nll, layer_outputs
from intactkv_eval.training.trainable_kv import TrainedRows
from intactkv_eval.training.trainer import TargetsOf, Trainer, TrainingArguments, split


class CalibrateOptions(NamedTuple):
    """What `intactkv calibrate` trains on, beside the arguments of training.

    Args:
        data: The conversations.
        generate_answers: The full-precision model answers those that wait, in so many tokens; 0 is no.
        max_tokens: The tokens of a conversation that are kept.
        min_assistant_tokens: Conversations without more assistant tokens are left out.
        disk_budget: Bytes on disk for full-precision outputs; beyond, they are computed again.
        recompute: Whether one layer's activations are in memory at a time (training/student.py).
        param_dtype: The dtype of the trained copy, float32 or bfloat16.
        tensorboard: Whether the log goes to TensorBoard too.
        conversations: So many, drawn by the seed; all if None.
    """

    data: str
    generate_answers: int = 0
    max_tokens: int = 1024
    min_assistant_tokens: int = 50
    disk_budget: int = 32 * 10**9
    recompute: bool = True
    param_dtype: str = "float32"
    tensorboard: bool = False
    conversations: int | None = None


class Result(NamedTuple):
    """What came of it: held-out quality before and after, nll of the full-precision model, and the run's log.

    first: whether this process, of several, is the one that writes and speaks.
    """

    pivot: PivotKV
    before: Quality
    after: Quality
    full_nll: float
    log: Path
    best_epoch: int
    examples: int
    first: bool


def calibrate_to_file(
    arguments: dict[str, Any],
    loading: dict[str, Any],
    options: CalibrateOptions,
    training: TrainingArguments,
    out: Path,
) -> Result:
    """Train the pivot's rows of the cell of `arguments`, and save them with what they were trained for.

    loading: arguments of lm_eval's `hf`. Raises ConfigError, DataError, PivotError, CheckpointError or
    UnsupportedModelError, before `out` is written.
    """
    arguments, reference = without_reference(arguments)
    cell = checked_cell(arguments, loading)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: a PivotKV file ends in .safetensors")
    if options.param_dtype not in {"float32", "bfloat16"}:
        raise ConfigError(f"--param-dtype {options.param_dtype}: use float32 or bfloat16")
    check_writable(out.parent)
    _check_cell(cell)
    with moment_of_run(date_of(cell.pivot)):  # both models render the same prompts, also where midnight lies between
        return _calibrated(cell, arguments, reference, loading, options, training, out)


def _calibrated(
    cell: CellSpec,
    arguments: dict[str, Any],
    reference: str | None,
    loading: dict[str, Any],
    options: CalibrateOptions,
    training: TrainingArguments,
    out: Path,
) -> Result:
    conversations = load_conversations(options.data).drawn(options.conversations, training.seed)
    folder = out.parent / f".{out.name}.calibration"
    full = IntactKVLM(**full_arguments(cell, reference), **{"batch_size": "auto", **loading})
    assert full.pivoted_model.pivot is not None
    check_same_source(cell, full.pivoted_model.pivot, reference)
    check_recompute(full.pivoted_model.model, options.recompute)
    ranks = Ranks(full.rank, full.world_size)
    with writing_alone(out, ranks):
        wanted = (
            None if any(map(waits, conversations.texts)) else options.conversations
        )  # questions are counted already
        conversations = with_answers(full, conversations, options.generate_answers, out, ranks)
        longest = min(options.max_tokens, full.max_length)
        _check_frequencies(full.pivoted_model, longest)
        examples = examples_of(
            conversations, full.tokenizer, full.framing.body, longest, options.min_assistant_tokens, wanted, full.chat
        )
        held_out = [examples[place] for place in split(len(examples), training)[1]]
        nll = full_nll(full.pivoted_model.model, full.pivoted_model.pivot, held_out)
        targets = _targets(full, examples, cell, options, folder, ranks)
        del full
        gc.collect()
        lm = IntactKVLM(**arguments, **loading)
        run = _Run(conversations, examples, targets, nll, options, training, folder, out, ranks)
        return _train(lm, run)


@contextmanager
def writing_alone(out: Path, ranks: Ranks) -> Iterator[None]:
    """Raises ConfigError where another process trains rows for the same file: they would share what lies beside it."""
    if ranks.rank != 0:
        yield
        return
    place = out.with_name(f".{out.name}.writing")  # a sweep holds `.lock` around all that it makes
    with locked(place, wait=False) as ours:
        if not ours:
            raise ConfigError(f"{out}: another intactkv calibrate is writing it; wait for it, or name another --out")
        try:
            yield
        finally:
            place.unlink(missing_ok=True)


def _check_frequencies(pivoted: PivotedModel, longest: int) -> None:
    """Raise ConfigError for conversations on both sides of the border of the RoPE frequencies: no rows fit in front."""
    border = pivoted.rope.border
    if border is not None and pivoted.rope.is_beyond(len(pivoted.token_ids) + longest):
        raise ConfigError(
            f"conversations of up to {longest} tokens: {type(pivoted.model).__name__} has other RoPE frequencies "
            f"beyond {border} positions, and rows are trained for one set of them: "
            f"use --max-tokens {border - len(pivoted.token_ids)}"
        )


class _Run(NamedTuple):
    """What is trained on, with the full-precision model's outputs and nll, and where its state and its result lie."""

    conversations: Conversations
    examples: Sequence[Example]
    targets: TargetsOf
    full_nll: float
    options: CalibrateOptions
    training: TrainingArguments
    folder: Path
    out: Path
    ranks: Ranks


def _train(lm: IntactKVLM, run: _Run) -> Result:
    options, training, ranks, out = run.options, run.training, run.ranks, run.out
    pivoted = lm.pivoted_model
    assert pivoted.pivot is not None
    rows = TrainedRows(pivoted.pivot, getattr(torch, options.param_dtype), pivoted.devices)
    record: dict[str, str | int | float | bool] = {
        **asdict(training),
        "max_tokens": options.max_tokens,
        "param_dtype": options.param_dtype,
    }
    record |= {
        "min_assistant_tokens": options.min_assistant_tokens,
        "recompute": options.recompute,
        "processes": ranks.world,
    }
    if options.conversations is not None:
        record["conversations"] = options.conversations
    if is_vicuna(lm.tokenizer):
        record["targets"] = "released"
    if bos_changes_tokens(lm.tokenizer):
        record["bos"] = "added by the tokenizer"
    if lm.chat.date is not None:
        record["chat_date"] = lm.chat.date
    digest = quantized_digest(pivoted.model)
    first = weight_hash((str(place), part) for place, part in enumerate(rows.parameters()))
    job = {"settings": record, "data": run.conversations.digest, "examples": digest_of_examples(run.examples),
           "quantized": digest, "pivot": first, "dtype": str(pivoted.model.dtype)}  # fmt: skip
    board = out.with_suffix(".tensorboard") if options.tensorboard else None
    state = RunState(run.folder, job, ranks.rank == 0, board)
    ranks.wait()  # all have read where they go on before the first one writes
    student = Student(pivoted.model, rows, options.recompute)
    before, after = Trainer(student, run.examples, run.targets, training, state, ranks).run()
    measured = {name: (getattr(before, name), getattr(after, name)) for name in Quality._fields}
    made = Calibrated(
        quantized=digest, cell=_name(lm.cell), data=run.conversations.digest, settings=record, held_out=measured,
        full_nll=run.full_nll,
    )  # fmt: skip
    state.close()
    pivot = rows.as_pivot()
    pivot = replace(pivot, fingerprint=pivot.fingerprint.model_copy(update={"calibrated": made}))
    log = out.with_suffix(".csv")
    ranks.wait()  # the others may still be reading what lies in the folder
    if ranks.rank == 0:
        pivot.save(out)
        shutil.copyfile(state.log_path, log)
        shutil.rmtree(run.folder)
    return Result(pivot, before, after, run.full_nll, log, state.best_epoch, len(run.examples), ranks.rank == 0)


def _check_cell(cell: CellSpec) -> None:
    if not cell.pivot.intact:
        raise ConfigError("calibrate: needs intact pivot rows, which it trains; drop pivot=none or intact=false")
    if cell.kv.bits < 16:
        raise ConfigError("calibrate: rows are trained in front of a full-precision KV cache; drop kv_bits")
    if cell.weights.search is not None:
        raise ConfigError("calibrate: weights=awq with awq_search; quantize with `intactkv quantize --method awq`")


def _targets(
    full: IntactKVLM,
    examples: Sequence[Example],
    cell: CellSpec,
    options: CalibrateOptions,
    folder: Path,
    ranks: Ranks,
) -> TargetsOf:
    """Full-precision outputs, in the basis of the cell's hidden states: kept in files where the budget allows."""
    assert full.built is not None
    model, pivot = full.pivoted_model.model, full.pivoted_model.pivot
    assert pivot is not None
    seed = rotation_seed(cell)
    pivot = turned_alike(model, pivot, seed)
    needed = bytes_of(model, examples)
    if needed > options.disk_budget:
        return lambda place: layer_outputs(model, pivot, examples[place])
    said = json.dumps([full.built.source_hash, str(model.dtype), seed, list(pivot.token_ids)])
    tokens = hashlib.sha256(said.encode())
    for example in examples:
        tokens.update(example.body.numpy().tobytes() + example.counted.numpy().tobytes())
    kept = KeptTargets(folder / f"full-{tokens.hexdigest()[:16]}")
    if ranks.rank == 0:
        kept.fill(model, pivot, examples)
    ranks.wait()
    return kept


def _name(cell: CellSpec) -> str:
    weights, activations = cell.weights, cell.activations
    size = f" {weights.method} w{weights.bits} g{weights.group_size}" if weights.method != "none" else ""
    rotated = " rotated" * weights.rotate
    return f"{cell.model.pretrained}{size}{rotated}" + (f" a{activations.bits}" if activations.bits < 16 else "")
