"""The commands that make the baseline which a checkpoint calibrated behind a pivot lacks. Knows no figures."""

import json
from collections.abc import Mapping
from typing import Any

from intactkv_eval.cell.arguments import arguments_of
from intactkv_eval.report.collect import Identity
from intactkv_eval.report.score import Score

_PLAIN = "PLAIN"
_LEFT_OUT = {"reference", "intact", "pivot", "pretrained"}


def missing_baseline(identity: Identity, score: Score, has_checkpoint: bool) -> str:
    """Why there is no share, and what to run. has_checkpoint: whether the plain one was evaluated behind a pivot."""
    steps = [] if has_checkpoint else [_quantize(identity)]
    steps.append(_evaluate(identity, score))
    return (
        "calibrated behind the pivot, so its baseline is the plainly calibrated checkpoint that computes the pivot's "
        f"tokens itself; run: {'; then: '.join(steps)}"
    )


def _quantize(identity: Identity) -> str:
    """The job of the checkpoint, without its pivot."""
    job: dict[str, Any] = json.loads(identity.job or "{}")
    words = [
        "intactkv quantize",
        str(identity.made_from or "MODEL"),
        f"--out {_PLAIN}",
        f"--method {job.get('method')}",
    ]
    words += [f"--bits {job.get('bits')}", f"--group-size {job.get('group_size')}"]
    words.append("--symmetric" if job.get("symmetric") else "--asymmetric")
    if job.get("rotate"):
        words.append("--rotate")
    activations: Mapping[str, Any] = job.get("activations") or {}
    if activations.get("bits", 16) < 16:
        words += [f"--act-bits {activations['bits']}", f"--act-scheme {activations.get('scheme')}"]
        words.append(f"--act-clip {activations.get('clip', 1.0):g}")
        words.append("--act-symmetric" if activations.get("symmetric", True) else "--act-asymmetric")
    calibration: Mapping[str, Any] = job.get("calibration") or {}
    words += [f"--{key} {calibration[key]}" for key in ("data", "samples", "length", "seed") if key in calibration]
    if job.get("dtype"):
        words.append(f"--dtype {job['dtype']}")
    words += [f"-o {key}={_plain(value)}" for key, value in sorted((job.get("options") or {}).items())]
    return " ".join(words)


def _evaluate(identity: Identity, score: Score) -> str:
    pivot = identity.cell.pivot.source
    arguments = {key: value for key, value in arguments_of(identity.cell).items() if key not in _LEFT_OUT}
    front = {"pivot": "none"} if pivot == "bos" else {"pivot": pivot, "intact": False}
    given = {"pretrained": _PLAIN, **arguments, **dict(identity.hf_arguments), **front}
    words = ["intactkv eval --model_args", ",".join(f"{key}={_plain(value)}" for key, value in given.items())]
    words.append(f"--tasks {score.task.partition(' [')[0]}")
    if score.settings.get("limit"):
        words.append(f"--limit {score.settings['limit']:g}")
    return " ".join(words)


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
