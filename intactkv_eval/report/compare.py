"""Which run is measured against which: its baseline (same cell, pivot not intact) and full precision; deltas, recovery.

delta = value - other's value
share = (baseline - intact) / (baseline - full precision), of log-likelihoods where the figure is a perplexity
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import expm1, hypot, inf, isfinite

from intactkv_eval.report.collect import Run
from intactkv_eval.report.identities import BOS
from intactkv_eval.report.index import RunIndex
from intactkv_eval.report.missing import missing_baseline
from intactkv_eval.report.pairing import is_paired, paired_test, share_between
from intactkv_eval.report.score import Score
from intactkv_eval.report.share import Share
from intactkv_eval.report.significance import Test


@dataclass(frozen=True)
class Delta:
    """A difference of two figures and its standard error, None where it is unknown.

    test: of the same documents of both, None where they were not logged or are too few. perplexity: that of the other
    run where the test is one of log-likelihoods, so that its interval is shown as perplexities:
    perplexity * (exp(end) - 1).
    """

    value: float
    stderr: float | None
    test: Test | None = None
    perplexity: float | None = None

    def interval(self, level: float) -> tuple[float, float] | None:
        """At confidence 1 - level, in the unit of `value`; None where nothing was tested."""
        found = self.test.interval(level) if self.test is not None else None
        if found is None or self.perplexity is None:
            return found
        return self.perplexity * _expm1(found[0]), self.perplexity * _expm1(found[1])


@dataclass(frozen=True)
class Comparison:
    """One score beside its baseline and full precision, as far as those were run.

    share: of the baseline's loss to full precision, what the intact pivot gives back; None where the three runs share
    too few documents. is_loss: whether the baseline is worse than full precision. plain: of the checkpoint that was
    calibrated like this one's but not behind a pivot. bos: of the same cell behind the intact [BOS], where this one has
    another. wanted: what must be run for a share, where that is known.
    """

    score: Score
    to_baseline: Delta | None
    to_full_precision: Delta | None
    share: Share | None = None
    is_loss: bool = False
    plain: Score | None = None
    to_plain: Delta | None = None
    bos: Score | None = None
    to_bos: Delta | None = None
    wanted: str = ""


def compare(run: Run, task: str, runs: Sequence[Run]) -> Comparison:
    """The score of `run` on `task` against the newest fitting runs among `runs`.

    A checkpoint that was calibrated behind the pivot has no honest baseline of its own: without that pivot it does what
    it was never made for. Its baseline is the plainly calibrated checkpoint, which computes the pivot's tokens itself.
    """
    return compare_within(run, task, RunIndex(runs))


def compare_within(run: Run, task: str, runs: RunIndex) -> Comparison:
    """`compare`, for the figures of many runs: these are indexed once."""
    score, identity = run.scores[task], run.identity
    intact, is_behind = identity.cell.pivot.intact, identity.behind is not None
    plain = runs.newest("plain", run, task) if is_behind else None
    baseline, wanted = None, ""
    if intact and is_behind:
        baseline = runs.newest("plain baseline", run, task)
        wanted = "" if baseline else missing_baseline(identity, score, has_checkpoint=plain is not None)
    elif intact:
        baseline = runs.newest("baseline", run, task)
    full = None if identity.is_full_precision else runs.newest("full precision", run, task)
    bos = runs.newest("bos", run, task) if intact and identity.cell.pivot.source != BOS else None
    share = share_between(score, baseline, full) if baseline and full else None
    return Comparison(
        score=score,
        to_baseline=_difference(score, baseline),
        to_full_precision=_difference(score, full),
        share=share,
        is_loss=bool(baseline and full and _is_worse(baseline, full)),
        plain=plain,
        to_plain=_difference(score, plain),
        bos=bos,
        to_bos=_difference(score, bos),
        wanted=wanted,
    )


def _difference(one: Score, other: Score | None) -> Delta | None:
    """one - other; None where there is no other, or one of them is no number."""
    if other is None or not isfinite(one.value - other.value):
        return None
    value, test = one.value - other.value, paired_test(one, other)
    if test is None:
        return Delta(value, None if is_paired([one, other]) else _unpaired_stderr(one, other))
    scale = one.value if one.of_nll else 1.0
    return Delta(value, test.stderr * scale, test, other.value if one.of_nll else None)


def _is_worse(baseline: Score, full: Score) -> bool:
    return baseline.value < full.value if baseline.higher_is_better else baseline.value > full.value


def _expm1(value: float) -> float:
    try:
        return expm1(value)
    except OverflowError:
        return inf


def _unpaired_stderr(one: Score, other: Score) -> float | None:
    if one.stderr is None or other.stderr is None:
        return None
    return hypot(one.stderr, other.stderr)
