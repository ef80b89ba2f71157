"""`intactkv pivots`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import PREFIX, check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.sanitize import say


def pivots(
    model: shared.ModelName,
    data: shared.Data = "wikitext2",
    samples: Annotated[
        int, typer.Option(help="The number of pieces of text; every other one judges what the rest chose.")
    ] = 16,
    length: Annotated[int, typer.Option(help="The number of tokens of a piece.")] = 256,
    seed: shared.Seed = 0,
    threshold: Annotated[
        float, typer.Option(help="How many times the median of its layer the hidden state of a pivot reaches.")
    ] = 8.0,
    max_prefix_tokens: Annotated[int, typer.Option(help="The longest prefix that is tried, with BOS.")] = 4,
    min_reduction: Annotated[
        float, typer.Option(help="The share of pivots that each token of the prefix must remove.")
    ] = 0.2,
    attention: Annotated[bool, typer.Option("--attention/--no-attention", help="Measure attention too.")] = True,
    out: Annotated[Path | None, typer.Option(help="The .json file to write: the prefix and its evidence.")] = None,
    dtype: shared.Dtype = "auto",
    revision: shared.Revision = "main",
    device: shared.Device = "cpu",
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Find the pivot tokens of a model, and propose a prefix that keeps later tokens from becoming pivots."""
    if out is not None and out.suffix != ".json":
        raise ConfigError(f"--out {out}: a prefix with its evidence ends in .json")
    if out is not None:
        check_output(out, PREFIX, [model, data], overwrite)
    elif overwrite:
        raise ConfigError("--overwrite: does nothing without --out")
    from intactkv_eval.commands.find_pivots import pivots_of
    from intactkv_eval.pivot.auto import Search

    search = Search(data, samples, length, seed, threshold, max_prefix_tokens, min_reduction)
    arguments = {"pretrained": model, "dtype": dtype, "revision": revision}
    loading = {"device": device, "trust_remote_code": trust_remote_code}
    say(pivots_of(arguments, loading, search, attention, out))
