"""Which run is measured against which: its baseline (same cell, pivot not intact) and full precision; deltas, recovery.

delta = value - other's value
recovered = (baseline - intact) / (baseline - full precision), empty where the denominator is within noise
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import hypot, isfinite

from intactkv_eval.config import ActivationSpec, KVSpec, WeightSpec
from intactkv_eval.report.collect import Identity, Run
from intactkv_eval.report.score import Score
from intactkv_eval.report.significance import (
    LEVEL,
    Test,
    paired_difference,
    recovered_interval,
    weighted_difference,
)

_NOISE = 2.0  # standard errors
_ANY = "bos"  # stands for every source of tokens; which these are is compared by themselves


@dataclass(frozen=True)
class Delta:
    """A difference and its standard error: paired over documents where both runs logged them, else None if unknown.

    test: of a paired one.
    """

    value: float
    stderr: float | None
    test: Test | None = None

    @property
    def within_noise(self) -> bool:
        """True where the difference cannot be told from 0, also because its documents are too few to tell."""
        if self.test is not None and (self.test.p is None or self.test.p >= LEVEL):
            return True
        return self.value == 0 or self.stderr is None or not abs(self.value) >= _NOISE * self.stderr


@dataclass(frozen=True)
class Comparison:
    """One score beside its baseline and full precision, as far as those were run.

    recovered_interval: 95%, None where the three runs share no documents. plain: of the checkpoint that was calibrated
    like this one's but not behind a pivot. bos: of the same cell behind the intact [BOS], where this one has another.
    """

    score: Score
    to_baseline: Delta | None
    to_full_precision: Delta | None
    recovered: float | None
    recovered_interval: tuple[float, float] | None = None
    plain: Score | None = None
    to_plain: Delta | None = None
    bos: Score | None = None
    to_bos: Delta | None = None


def compare(run: Run, task: str, runs: Sequence[Run]) -> Comparison:
    """The score of `run` on `task` against the newest fitting runs among `runs`."""
    score = run.scores[task]
    intact = run.identity.cell.pivot.intact
    baseline = _score_of(baseline_of(run.identity), run, task, runs) if intact else None
    full = None if run.identity.is_full_precision else _score_of(full_precision_of(run.identity), run, task, runs)
    plain = _plain_score(run, task, runs) if run.identity.behind else None
    bos = _bos_score(run, task, runs) if intact and run.identity.cell.pivot.source != _ANY else None
    recovered = _recovered(score, baseline, full) if baseline and full else None
    return Comparison(
        score=score,
        to_baseline=_difference(score, baseline),
        to_full_precision=_difference(score, full),
        recovered=recovered,
        recovered_interval=_interval(score, baseline, full) if recovered is not None and baseline and full else None,
        plain=plain,
        to_plain=_difference(score, plain),
        bos=bos,
        to_bos=_difference(score, bos),
    )


def _difference(one: Score, other: Score | None) -> Delta | None:
    """one - other; None where there is no other, or one of them is no number."""
    if other is None or not isfinite(one.value - other.value):
        return None
    test = _test(one, other)
    value = one.value - other.value
    return Delta(value, test.stderr, test) if test else Delta(value, _unpaired_stderr(one, other))


def _test(one: Score, other: Score) -> Test | None:
    if one.values.keys() != other.values.keys() or one.weights != other.weights:
        return None
    shared = sorted(one.values)
    if not one.weights:
        return paired_difference([one.values[i] for i in shared], [other.values[i] for i in shared], one.of_nll)
    parts = []
    for task, weight in one.weights.items():
        places = [place for place in shared if place[0] == task]
        parts.append((weight, [one.values[i] for i in places], [other.values[i] for i in places]))
    return weighted_difference(parts)


def _recovered(intact: Score, baseline: Score, full: Score) -> float | None:
    loss = _difference(baseline, full)
    if loss is None or not isfinite(intact.value):
        return None
    worse = loss.value < 0 if baseline.higher_is_better else loss.value > 0
    if loss.within_noise or not worse:
        return None
    return (baseline.value - intact.value) / loss.value


def _interval(intact: Score, baseline: Score, full: Score) -> tuple[float, float] | None:
    shared = sorted(intact.values)
    if intact.weights or not shared or any(score.values.keys() != intact.values.keys() for score in (baseline, full)):
        return None
    kept, lost, whole = ([score.values[place] for place in shared] for score in (intact, baseline, full))
    return recovered_interval(kept, lost, whole, intact.of_nll)


def _unpaired_stderr(one: Score, other: Score) -> float | None:
    if one.stderr is None or other.stderr is None:
        return None
    return hypot(one.stderr, other.stderr)


def _score_of(wanted: Identity, run: Run, task: str, runs: Sequence[Run]) -> Score | None:
    return _newest(lambda identity: comparable(identity, wanted) == wanted, run, task, runs)


def _plain_score(run: Run, task: str, runs: Sequence[Run]) -> Score | None:
    """Of another checkpoint, so of other weights, by the same job."""
    wanted = _by_job(run.identity)
    return _newest(lambda identity: identity.behind is None and _by_job(identity) == wanted, run, task, runs)


def _bos_score(run: Run, task: str, runs: Sequence[Run]) -> Score | None:
    """Of the same cell but for its tokens in front."""
    wanted = baseline_of(run.identity)

    def fits(identity: Identity) -> bool:
        pivot = identity.cell.pivot
        return pivot.intact and pivot.source == _ANY and comparable(baseline_of(identity), wanted) == wanted

    return _newest(fits, run, task, runs, same_tokens=False)


def _by_job(identity: Identity) -> Identity:
    model = identity.cell.model.model_copy(update={"pretrained": ""})
    cell = identity.cell.model_copy(update={"model": model})
    return replace(identity, cell=cell, source_hash=None, checkpoint=None, behind=None)


def _newest(
    fits: Callable[[Identity], bool], run: Run, task: str, runs: Sequence[Run], same_tokens: bool = True
) -> Score | None:
    """The newest score of a model on the same task, behind the same tokens, under the same settings."""
    for other in reversed(runs):
        if same_tokens and other.pivot_tokens != run.pivot_tokens:
            continue
        if not fits(other.identity) or task not in other.scores:
            continue
        if not unlike(run.scores[task], other.scores[task]):
            return other.scores[task]
    return None


def unlike(one: Score, other: Score) -> list[str]:
    """What makes two scores different measurements, named with both sides; empty where they are the same."""
    found = [
        f"{key} ({one.settings.get(key)}, {other.settings.get(key)})"
        for key in sorted(one.settings.keys() | other.settings.keys())
        if one.settings.get(key) != other.settings.get(key)
    ]
    if one.metric != other.metric:
        found.append(f"metric ({one.metric}, {other.metric})")
    if one.values and other.values and one.values.keys() != other.values.keys():
        found.append(f"documents with a figure ({len(one.values)}, {len(other.values)}, not the same ones)")
    if one.documents and other.documents and one.documents != other.documents:
        found.append("documents or their prompts (the hashes of their texts differ)")
    if not (one.documents and other.documents) and one.drawn != other.drawn:
        found.append(f"seed of the few-shot examples ({one.drawn}, {other.drawn})")
    if not isfinite(one.value - other.value):
        found.append(f"figures, one of which is no number ({one.value}, {other.value})")
    return found


def comparable(identity: Identity, wanted: Identity) -> Identity:
    """An identity as it is compared with `wanted`: named by its tokens, its weights' hash only where that is known."""
    found = _by_tokens(identity)
    return replace(found, source_hash=wanted.source_hash and found.source_hash)


def _by_tokens(identity: Identity) -> Identity:
    """Tokens that are computed are the same wherever their ids come from: a name, a list or a file."""
    pivot = identity.cell.pivot
    if pivot.intact:
        return identity
    pivot = pivot.model_copy(update={"source": _ANY})
    return replace(identity, cell=identity.cell.model_copy(update={"pivot": pivot}))


def baseline_of(identity: Identity) -> Identity:
    """The same model, the same tokens in front, computed by itself."""
    cell = identity.cell
    pivot = cell.pivot.model_copy(update={"intact": False, "source": _ANY, "transfer": False})
    model = cell.model.model_copy(update={"reference": None})
    kv = cell.kv.model_copy(update={"exempt": True})  # of intact rows alone
    formulas = tuple(one for one in identity.formulas if not one[0].startswith("calibration"))  # of the intact rows
    cell = cell.model_copy(update={"pivot": pivot, "model": model, "kv": kv})
    return replace(identity, cell=cell, formulas=formulas)


def full_precision_of(identity: Identity) -> Identity:
    """Nothing quantized. A checkpoint quantized elsewhere is compared with its reference, whose weights are others."""
    baseline = baseline_of(identity).cell
    reference = identity.cell.model.reference or identity.made_from
    other = {"pretrained": reference, "revision": "main"} if reference else {}
    model = baseline.model.model_copy(update=other)
    cell = baseline.model_copy(
        update={
            "weights": WeightSpec(),
            "kv": KVSpec(),
            "activations": ActivationSpec(),
            "backend": "auto",
            "model": model,
        }
    )
    source = None if reference else identity.source_hash
    return Identity(cell=cell, hf_arguments=identity.hf_arguments, source_hash=source)
