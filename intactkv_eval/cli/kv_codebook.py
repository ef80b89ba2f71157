"""`intactkv kv-codebook`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import CODEBOOK, check_output
from intactkv_eval.sanitize import say


def kv_codebook(
    model: shared.ModelName,
    data: shared.Data,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="The kv_bits of the cell.")] = 4,
    pivot: Annotated[str, typer.Option(help="The pivot of the cell: none, bos, prompt or tokens:ID+ID+...")] = "bos",
    quantize_pivot: Annotated[
        bool, typer.Option("--quantize-pivot", help="The cell has kv_quantize_pivot=true.")
    ] = False,
    sink_tokens: Annotated[int, typer.Option(min=0, help="The kv_sink_tokens of the cell.")] = 0,
    samples: Annotated[int, typer.Option(min=1, help="The number of random pieces of the text.")] = 16,
    length: Annotated[int, typer.Option(min=1, help="The number of tokens of a piece.")] = 512,
    seed: shared.Seed = 0,
    dtype: shared.Dtype = "auto",
    revision: shared.Revision = "main",
    chat_template: shared.ChatTemplate = None,
    chat_date: shared.ChatDate = None,
    device: shared.Device = "cpu",
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Calibrate the codebook that kv_scheme=pre_rope rounds to: cells take it with kv_codebook=FILE.safetensors."""
    check_output(out, CODEBOOK, [model, data, chat_template], overwrite)
    from intactkv_eval.commands.kv_codebook import CodebookOptions, codebook_of_text

    prompts = {"chat_template": chat_template, "chat_date": chat_date}
    arguments = shared.full_precision_cell(model, pivot, dtype=dtype, revision=revision, **prompts)
    options = CodebookOptions(data, bits, samples, length, seed, sink_tokens, quantize_pivot)
    loading = {"device": device, "trust_remote_code": trust_remote_code}
    calibration = codebook_of_text(arguments, loading, options, out).calibration
    done = f"{bits} bits, {calibration.tokens} tokens of {calibration.origin}"
    say(f"{out}: {done}; first {calibration.left_out} rows left out")
