"""`intactkv calibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from intactkv_eval.cli import options as shared
from intactkv_eval.commands.outputs import CONVERSATIONS, LOG, PIVOT, check_output, inputs_of
from intactkv_eval.sanitize import say


def calibrate(
    model_args: shared.ModelArgs,
    data: Annotated[
        str, typer.Option(help="The conversations: .json (ShareGPT), .jsonl, .txt, or a data set ORG/NAME.")
    ],
    out: Annotated[Path, typer.Option(help="The .safetensors file to write; a .csv log is put beside it.")],
    generate_answers: Annotated[
        int, typer.Option(min=0, help="Let the full-precision model answer open questions, in so many tokens.")
    ] = 0,
    conversations: Annotated[
        int | None, typer.Option(min=2, help="The number of conversations drawn by --seed; all if none is given.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(help="The constant learning rate of AdamW.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="The number of conversations of a step.")] = 16,
    epochs: Annotated[int, typer.Option(help="The largest number of epochs.")] = 20,
    max_grad_norm: Annotated[
        float, typer.Option(help="The norm to which a step's gradient is clipped; 0 for no clipping.")
    ] = 0.3,
    held_out: Annotated[float, typer.Option(help="The share of the conversations that is never trained on.")] = 0.2,
    patience: Annotated[
        int, typer.Option(help="The number of epochs without a better held-out loss before training ends.")
    ] = 3,
    seed: Annotated[int, typer.Option(help="The seed of what is drawn, held out, and of the order.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=2, help="The tokens of a conversation that are kept.")] = 1024,
    min_assistant_tokens: Annotated[
        int, typer.Option(min=0, help="Leave out conversations that have no more assistant tokens than this.")
    ] = 50,
    disk_budget: Annotated[
        float, typer.Option(min=0, help="The gigabytes of full-precision outputs kept on disk; beyond, recompute them.")
    ] = 32,
    recompute: Annotated[
        bool,
        typer.Option("--recompute/--no-recompute", help="Keep one layer's activations in memory, or all (faster)."),
    ] = True,
    param_dtype: Annotated[str, typer.Option(help="The dtype of the trained copy: float32 or bfloat16.")] = "float32",
    tensorboard: Annotated[bool, typer.Option(help="Log for TensorBoard too, in OUT.tensorboard.")] = False,
    device: shared.Device = "cpu",
    trust_remote_code: shared.TrustRemoteCode = False,
    overwrite: shared.Overwrite = False,
) -> None:
    """Train the pivot's KV for one quantized model: later runs take pivot=FILE.safetensors.

    The defaults are the paper's, which takes 128 conversations. A run that was killed continues when the same command
    is given again. On several GPUs: accelerate launch -m intactkv_eval.cli calibrate ...
    """
    from intactkv_eval.commands.calibrate import CalibrateOptions, calibrate_to_file
    from intactkv_eval.training.trainer import TrainingArguments

    arguments, loading = shared.cell_and_loading(model_args, device, trust_remote_code)
    inputs = [*inputs_of(arguments, loading), data]
    check_output(out, PIVOT, inputs, overwrite)
    check_output(out.with_suffix(".csv"), LOG, inputs, overwrite)
    if generate_answers:
        check_output(out.with_suffix(".answers.jsonl"), CONVERSATIONS, inputs, overwrite)
    options = CalibrateOptions(
        data=data,
        generate_answers=generate_answers,
        max_tokens=max_tokens,
        min_assistant_tokens=min_assistant_tokens,
        disk_budget=int(disk_budget * 1e9),
        recompute=recompute,
        param_dtype=param_dtype,
        tensorboard=tensorboard,
        conversations=conversations,
    )
    training = TrainingArguments(learning_rate, batch_size, epochs, max_grad_norm, held_out, patience, seed)
    result = calibrate_to_file(arguments, loading, options, training, out)
    if not result.first:
        return
    rows = zip(("all layers", "last layer", "nll a token"), result.before, result.after, strict=True)
    say(f"held out     {'before':>9} {'after':>9}   ({result.examples} conversations, best epoch {result.best_epoch})")
    for name, before, after in rows:
        full = f"   (full precision {result.full_nll:.4g})" if name == "nll a token" else ""
        say(f"{name:12} {before:9.4g} {after:9.4g}{full}")
    if not result.best_epoch:
        say("no epoch was better on held-out conversations: the file holds the rows as they were", err=True)
    calibrated = result.pivot.fingerprint.calibrated
    assert calibrated is not None
    say(f"{out}: for {calibrated.cell}; log in {result.log}")
