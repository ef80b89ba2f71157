"""Which run is measured against which: its baseline (same cell, pivot not intact) and full precision; deltas, recovery.

delta = value - other's value
recovered = (baseline - intact) / (baseline - full precision), empty where the denominator is within noise
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, sqrt

from intactkv_eval.config import ActivationSpec, KVSpec, WeightSpec
from intactkv_eval.report.collect import Identity, Run, Score

_NOISE = 2.0  # standard errors
_ANY = "bos"  # stands for every source of tokens; which these are is compared by themselves


@dataclass(frozen=True)
class Delta:
    """A difference and its standard error: paired over documents where both runs logged them, else None if unknown."""

    value: float
    stderr: float | None

    @property
    def within_noise(self) -> bool:
        """True where the difference cannot be told from 0, also because its error is not known."""
        return self.value == 0 or self.stderr is None or abs(self.value) < _NOISE * self.stderr


@dataclass(frozen=True)
class Comparison:
    """One score beside its baseline and full precision, as far as those were run."""

    score: Score
    to_baseline: Delta | None
    to_full_precision: Delta | None
    recovered: float | None


def compare(run: Run, task: str, runs: Sequence[Run]) -> Comparison:
    """The score of `run` on `task` against the newest fitting runs among `runs`."""
    score = run.scores[task]
    intact = run.identity.cell.pivot.intact
    baseline = _score_of(_baseline(run.identity), run, task, runs) if intact else None
    full = None if run.identity.is_full_precision else _score_of(_full_precision(run.identity), run, task, runs)
    return Comparison(
        score=score,
        to_baseline=difference(score, baseline) if baseline else None,
        to_full_precision=difference(score, full) if full else None,
        recovered=_recovered(score, baseline, full) if baseline and full else None,
    )


def difference(one: Score, other: Score) -> Delta:
    """one - other."""
    paired = _paired_stderr(one, other)
    return Delta(one.value - other.value, _unpaired_stderr(one, other) if paired is None else paired)


def _recovered(intact: Score, baseline: Score, full: Score) -> float | None:
    loss = difference(baseline, full)
    worse = loss.value < 0 if baseline.higher_is_better else loss.value > 0
    if loss.within_noise or not worse:
        return None
    return (baseline.value - intact.value) / loss.value


def _paired_stderr(one: Score, other: Score) -> float | None:
    """Of the mean difference over the documents of both; for a perplexity, of its first-order change with each nll."""
    shared = sorted(one.values.keys() & other.values.keys())
    if len(shared) < 2 or len(shared) != len(one.values) or len(shared) != len(other.values):
        return None
    weights = [1.0, 1.0]
    if one.of_nll:
        weights = [exp(sum(score.values.values()) / len(shared)) for score in (one, other)]
    terms = [weights[0] * one.values[i] - weights[1] * other.values[i] for i in shared]
    mean = sum(terms) / len(terms)
    return sqrt(sum((term - mean) ** 2 for term in terms) / (len(terms) - 1) / len(terms))


def _unpaired_stderr(one: Score, other: Score) -> float | None:
    if one.stderr is None or other.stderr is None:
        return None
    return sqrt(one.stderr**2 + other.stderr**2)


def _score_of(wanted: Identity, run: Run, task: str, runs: Sequence[Run]) -> Score | None:
    """The newest score of a model on the same task, behind the same tokens, under the same settings."""
    for other in reversed(runs):
        found = _by_tokens(other.identity)
        found = replace(found, source_hash=wanted.source_hash and found.source_hash)
        if found != wanted or other.pivot_tokens != run.pivot_tokens or task not in other.scores:
            continue
        if other.scores[task].column == run.scores[task].column:
            return other.scores[task]
    return None


def _by_tokens(identity: Identity) -> Identity:
    """Tokens that are computed are the same wherever their ids come from: a name, a list or a file."""
    pivot = identity.cell.pivot
    if pivot.intact:
        return identity
    pivot = pivot.model_copy(update={"source": _ANY})
    return replace(identity, cell=identity.cell.model_copy(update={"pivot": pivot}))


def _baseline(identity: Identity) -> Identity:
    """The same model, the same tokens in front, computed by itself."""
    cell = identity.cell
    pivot = cell.pivot.model_copy(update={"intact": False, "source": _ANY, "transfer": False})
    model = cell.model.model_copy(update={"reference": None})
    kv = cell.kv.model_copy(update={"exempt": True})  # of intact rows alone
    return replace(identity, cell=cell.model_copy(update={"pivot": pivot, "model": model, "kv": kv}))


def _full_precision(identity: Identity) -> Identity:
    """Nothing quantized. A checkpoint quantized elsewhere is compared with its reference, whose weights are others."""
    baseline = _baseline(identity).cell
    reference = identity.cell.model.reference
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
    return replace(identity, cell=cell, source_hash=source, checkpoint=None, awq_search=None)
