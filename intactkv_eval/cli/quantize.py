"""`intactkv quantize`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.sanitize import say


def quantize(
    model: shared.ModelName,
    out: Annotated[Path, typer.Option(help="The new folder to write.")],
    method: Annotated[
        str | None, typer.Option(help="The method: rtn (default), gptq, awq, omniquant or quarot.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="The bits of a weight: 2, 3, 4 or 8.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="The number of inputs that share a scale (128); -1 for one scale per channel.")
    ] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="Put zero in the middle of the range, or not.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="The settings of a published table, by name; options override them.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The calibration text: wikitext2, c4, pile, or a .txt or .jsonl file.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="The number of calibration windows (128).")] = None,
    length: Annotated[int | None, typer.Option(help="The number of tokens of a window (2048).")] = None,
    seed: Annotated[int | None, typer.Option(help="The seed that draws the windows (0).")] = None,
    pivot: Annotated[
        str | None, typer.Option(help="Calibrate behind this pivot's KV, for instance bos or tokens:1+2.")
    ] = None,
    chat_date: shared.ChatDate = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An option of the method's own, KEY=VALUE.")
    ] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Rotate the model first, as QuaRot does.")
    ] = None,
    act_bits: Annotated[int | None, typer.Option(help="The bits of activations: 8, 6 or 4.")] = None,
    act_scheme: Annotated[
        str | None, typer.Option(help="The range of activations: token (dynamic) or tensor (static, calibrated).")
    ] = None,
    act_clip: Annotated[float | None, typer.Option(help="The share of the range of activations that is kept.")] = None,
    act_symmetric: Annotated[
        bool | None,
        typer.Option("--act-symmetric/--act-asymmetric", help="Symmetric activations (the default), or not."),
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="The format: gptq, awq, compressed-tensors or intactkv.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The dtype of what stays in full precision: auto, float16 or bfloat16.")
    ] = "auto",
    revision: shared.Revision = "main",
    trust_remote_code: shared.TrustRemoteCode = False,
    device: Annotated[str, typer.Option(help="The device that works on a layer: cpu, cuda, cuda:0, ...")] = "cpu",
) -> None:
    """Quantize a model block by block and write a checkpoint: GPTQModel and transformers load it.

    A run that was killed continues when the same command is given again. Of compressed-tensors, transformers itself
    loads only symmetric ones (--symmetric), whoever wrote them.
    """
    from intactkv_eval.commands.quantize import Source, quantize_to_folder
    from intactkv_eval.quantize.job import job_from

    given: dict[str, Any] = {
        "method": method,
        "bits": bits,
        "group_size": group_size,
        "symmetric": symmetric,
        "data": data,
        "samples": samples,
        "length": length,
        "seed": seed,
        "pivot": pivot,
        "rotate": rotate,
        "act_bits": act_bits,
        "act_scheme": act_scheme,
        "act_clip": act_clip,
        "act_symmetric": act_symmetric,
    }
    job = job_from(given, option or [], preset)
    source = Source(model, dtype, revision, trust_remote_code, device, chat_date)
    count, written = quantize_to_folder(source, out, layout, job)
    say(f"{out}: {count} layers in {job.bits} bits by {job.method}, format {written}")
