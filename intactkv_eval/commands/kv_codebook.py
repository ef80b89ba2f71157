"""What `intactkv kv-codebook` does: a full-precision model and samples in, a file with a KV codebook out."""

from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.assemble.load_cell import load_cell
from intactkv_eval.assemble.open_source import open_source
from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.data.calibration_text import load_samples
from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.kv_quant.codebook_calibration import calibrate_codebook
from intactkv_eval.pivot.capture import fingerprint_of
from intactkv_eval.storage.files import check_writable


class CodebookOptions(NamedTuple):
    """The text that a codebook is calibrated on, and what of a cell its ranges depend on.

    Args:
        data: The text, as data/calibration_text.py takes it.
        bits: kv_bits of the cell.
        samples: The number of random pieces of the text.
        length: The number of tokens of a piece.
        seed: Of the pieces.
        sink_tokens: kv_sink_tokens of the cell.
        quantize_pivot: kv_quantize_pivot of the cell.
    """

    data: str
    bits: int = 4
    samples: int = 16
    length: int = 512
    seed: int = 0
    sink_tokens: int = 0
    quantize_pivot: bool = False


def codebook_of_text(
    arguments: dict[str, Any], loading: dict[str, Any], options: CodebookOptions, out: Path
) -> Codebook:
    """Calibrate a codebook as a cell with these `arguments` (pretrained, revision, dtype, pivot, chat_template) runs.

    Raises ConfigError, CheckpointError, PivotError, DataError or OSError, before anything is written.
    """
    cell = cell_from_args(arguments)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: a file with a KV codebook ends in .safetensors")
    check_writable(out.parent)
    source = open_source(cell, **loading)
    built = load_cell(cell, source)
    if built.quantization is not None:
        raise ConfigError(f"{arguments['pretrained']} is quantized: a KV codebook is of the full-precision model")
    pivoted = built.pivoted
    if options.quantize_pivot and pivoted.pivot is None:
        raise ConfigError("--quantize-pivot: does nothing with --pivot none, whose rows are no intact ones")
    intact = len(pivoted.token_ids) if pivoted.pivot is not None and not options.quantize_pivot else 0
    fingerprint = fingerprint_of(pivoted.model, cell.model.revision)
    texts = load_samples(options.data, source.tokenizer, options.samples, options.length, options.seed).tokens
    origin = f"{Path(options.data).name}: {options.samples} samples of {options.length} tokens, seed {options.seed}"
    left_out = max(intact, options.sink_tokens)
    codebook = calibrate_codebook(pivoted.model, texts, options.bits, fingerprint, pivoted.token_ids, left_out, origin)
    codebook.save(out)
    return codebook
