"""What `intactkv figures` does: a cell and texts in, the numbers that its figures show out."""

import gc
import hashlib
import json
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from intactkv_eval.assemble.chat_date import date_of, moment_of_run
from intactkv_eval.cell.records import NUMBERS_HASH
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.commands.figure_data import (
    SHOWN,
    attention_maps,
    by_intact_rows,
    cache_rows,
    expected_outputs,
    outliers,
)
from intactkv_eval.commands.reference_cell import (
    check_same_source,
    full_arguments,
    rotation_seed,
    turned_alike,
    without_reference,
)
from intactkv_eval.data.calibration_text import load_samples
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.hf_arguments import checked_cell
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.sanitize import struck_record
from intactkv_eval.storage.files import check_writable, write_atomic


class FigureOptions(NamedTuple):
    """data, samples, length, seed: what is looked at. layers, head: of attention; layer: of outputs and cache."""

    data: str
    samples: int = 8
    length: int = 256
    seed: int = 0
    layers: tuple[int, ...] = ()
    head: int | None = None
    layer: int | None = None


def numbers_to_folder(arguments: dict[str, Any], loading: dict[str, Any], options: FigureOptions, out: Path) -> None:
    """Compute what the figures of a cell show, and save it as report/plots.py reads it.

    Raises ConfigError, DataError, PivotError, CheckpointError or UnsupportedModelError.
    """
    asked, (arguments, reference) = arguments, without_reference(arguments)
    cell = checked_cell(arguments, loading)
    check_writable(out)
    if not cell.pivot.intact:
        raise ConfigError("figures: show what intact pivot rows do; drop pivot=none or intact=false")
    if cell.kv.scheme == "channel_key" or cell.kv.quantize_pivot:
        raise ConfigError(
            "figures: intact rows are counted one by one; drop kv_scheme=channel_key and kv_quantize_pivot=true"
        )
    with moment_of_run(date_of(cell.pivot)):
        _numbers_to_folder(cell, arguments, reference, loading, options, out, asked)


def _numbers_to_folder(
    cell: CellSpec,
    arguments: dict[str, Any],
    reference: str | None,
    loading: dict[str, Any],
    options: FigureOptions,
    out: Path,
    asked: dict[str, Any],
) -> None:
    full = IntactKVLM(**full_arguments(cell, reference), **loading)
    model, pivot = full.pivoted_model.model, full.pivoted_model.pivot
    assert pivot is not None
    check_same_source(cell, pivot, reference)
    count = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    layers = tuple(sorted(set(options.layers or (0, count // 3, 2 * count // 3, count - 1))))  # as they are computed
    heads = int(model.config.get_text_config(decoder=True).num_attention_heads)
    if options.head is not None and options.head >= heads:
        raise ConfigError(f"--head {options.head}: this model has {heads}, 0 to {heads - 1}")
    _check_layers((*layers, *([] if options.layer is None else [options.layer])), count)
    samples = load_samples(options.data, full.tokenizer, options.samples, options.length, options.seed)
    ids = [*pivot.token_ids, *samples.tokens[0].tolist()][: max(SHOWN, len(pivot) + 8)]
    numbers = outliers(model, ids, options.layer)
    numbers["attention"] = attention_maps(model, ids, layers, options.head)
    pivot = turned_alike(model, pivot, rotation_seed(cell))
    expected = expected_outputs(model, pivot, samples.tokens)
    del full, model
    gc.collect()
    lm = IntactKVLM(**arguments, **loading)
    pivoted, tokenizer = lm.pivoted_model, lm.tokenizer
    assert pivoted.pivot is not None
    if reference or _changes_outputs(cell):
        numbers |= by_intact_rows(pivoted.model, pivoted.pivot, samples.tokens, expected, pivoted.kv_quantizer)
    layer = count // 2 if options.layer is None else options.layer
    if pivoted.kv_quantizer is not None:
        numbers |= cache_rows(pivoted, samples.tokens[0][:SHOWN].tolist(), layer)
    said = {
        "settings": _settings(asked, options, samples.digest),
        "words": [tokenizer.decode([token]) for token in ids],
        "pivot_words": [tokenizer.decode([token]) for token in pivoted.token_ids],
        "layers": list(layers),
        "head": "mean of heads" if options.head is None else f"head {options.head}",
        "cache_layer": layer,
    }
    _save(out, numbers, said)


def _save(out: Path, numbers: dict[str, Any], said: dict[str, Any]) -> None:
    """The words first, with the hash of the numbers: a kill between the two leaves no words beside other numbers."""
    held = BytesIO()
    np.savez_compressed(held, **numbers)
    content = held.getvalue()
    said = {**struck_record(said), NUMBERS_HASH: hashlib.sha256(content).hexdigest()}
    text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
    write_atomic(out / "figures.json", lambda partial: partial.write_text(text, encoding="utf-8"))
    write_atomic(out / "figures.npz", lambda partial: partial.write_bytes(content))


def _settings(arguments: dict[str, Any], options: FigureOptions, digest: str) -> str:
    cell = ", ".join(f"{key}={Path(str(value)).name if key in {'pretrained', 'reference'} else value}"
                     for key, value in arguments.items())  # fmt: skip
    text = f"{options.samples} pieces of {options.length} tokens of {Path(options.data).name}, seed {options.seed}"
    return f"{cell}; {text} (sha256 {digest[:12]})"


def _changes_outputs(cell: CellSpec) -> bool:
    """Whether anything is quantized: only then do intact rows change what a forward gives."""
    quantized = cell.weights.method != "none" or cell.activations.bits < 16 or cell.kv.bits < 16
    return quantized or cell.model.reference is not None


def _check_layers(layers: tuple[int, ...], count: int) -> None:
    outside = [layer for layer in layers if not 0 <= layer < count]
    if outside:
        raise ConfigError(f"layers {outside}: this model has layers 0 to {count - 1}")
