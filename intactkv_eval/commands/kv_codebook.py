"""What `intactkv kv-levels` does: a full-precision model and samples in, a file of KV levels out."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from intactkv_eval.commands.evaluate import check_writable
from intactkv_eval.data.calibration_text import load_samples
from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.codebook import KVLevels
from intactkv_eval.kv_quant.codebook_calibration import calibrate_levels
from intactkv_eval.lm.hf_arguments import checked_cell
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.capture import fingerprint_of


def levels_to_file(
    arguments: dict[str, Any],
    loading: dict[str, Any],
    bits: int,
    samples: Callable[[Any], Sequence[Tensor]],
    origin: str,
    out: Path,
    keep: int = 0,
    exempt: bool = True,
) -> KVLevels:
    """Calibrate levels as a cell with these `arguments` (pretrained, revision, dtype, pivot, chat_template) runs; save.

    samples: tokenizer -> token ids [T] each. keep, exempt: kv_keep and kv_exempt of the cell.
    Raises ConfigError, CheckpointError, PivotError, DataError or OSError, before anything is written.
    """
    checked_cell(arguments, loading)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: a file of KV levels ends in .safetensors")
    check_writable(out.parent)
    lm = IntactKVLM(**arguments, **loading)
    assert lm.built is not None
    if lm.built.quantization is not None:
        raise ConfigError(f"{arguments['pretrained']} is quantized: KV levels are those of the full-precision model")
    pivoted = lm.pivoted_model
    if not exempt and pivoted.pivot is None:
        raise ConfigError("--no-exempt: does nothing with --pivot none, whose rows are no intact ones")
    left_out = max(len(pivoted.token_ids) if pivoted.pivot is not None and exempt else 0, keep)
    fingerprint = fingerprint_of(pivoted.model, lm.cell.model.revision)
    texts = samples(lm.tokenizer)
    levels = calibrate_levels(pivoted.model, texts, bits, fingerprint, pivoted.token_ids, left_out, origin)
    levels.save(out)
    return levels


def levels_of_text(
    arguments: dict[str, Any],
    loading: dict[str, Any],
    bits: int,
    data: str,
    count: int,
    length: int,
    seed: int,
    out: Path,
    keep: int,
    exempt: bool,
) -> KVLevels:
    """`levels_to_file` on calibration samples (data/calibration_text.py)."""
    origin = f"{Path(data).name}: {count} samples of {length} tokens, seed {seed}"

    def samples(tokenizer: Any) -> Sequence[Tensor]:
        return load_samples(data, tokenizer, count, length, seed).tokens

    return levels_to_file(arguments, loading, bits, samples, origin, out, keep, exempt)
