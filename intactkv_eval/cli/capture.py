"""`intactkv capture`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import PIVOT, check_output
from intactkv_eval.sanitize import say


def capture(
    model: shared.ModelName,
    out: Annotated[Path, typer.Option(help="The .safetensors file to write.")],
    pivot: Annotated[str, typer.Option(help="The pivot tokens: bos, prompt or tokens:ID+ID+...")] = "bos",
    dtype: shared.Dtype = "auto",
    revision: shared.Revision = "main",
    chat_template: shared.ChatTemplate = None,
    chat_date: shared.ChatDate = None,
    device: shared.Device = "cpu",
    trust_remote_code: shared.TrustRemoteCode = False,
    lightllm: Annotated[Path | None, typer.Option(help="A checkpoint that gets the pivot for LightLLM too.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="The number of tensor-parallel ranks of LightLLM.")] = 1,
    overwrite: shared.Overwrite = False,
) -> None:
    """Save the pivot's full-precision KV: later runs take pivot=FILE.safetensors and no full-precision model."""
    check_output(out, PIVOT, [model, chat_template], overwrite)
    from intactkv_eval.commands.capture import capture_to_file

    prompts = {"chat_template": chat_template, "chat_date": chat_date}
    arguments = shared.full_precision_cell(model, pivot, dtype=dtype, revision=revision, **prompts)
    pivot_kv = capture_to_file(arguments, {"device": device, "trust_remote_code": trust_remote_code}, out)
    if lightllm is not None:
        from intactkv_eval.pivot.exports.lightllm import write_lightllm

        write_lightllm(pivot_kv, lightllm, ranks)
    tokens = f"{len(pivot_kv)} pivot token{'s' * (len(pivot_kv) > 1)} {list(pivot_kv.token_ids)}"
    say(f"{out}: {tokens} of {pivot_kv.fingerprint.model}")
