"""The share recovered and its confidence set: Fieller's, its agreement with the test of the difference, its coverage."""

from math import inf, sqrt

import numpy as np
import pytest
from helpers.scores import score
from scipy import stats

from intactkv_eval.report.pairing import paired_test, share_between
from intactkv_eval.report.share import ShareSet


def runs(given, lost):
    """Intact, baseline and full precision whose differences are these."""
    zero = np.zeros(len(given))
    return score(zero - given), score(zero), score(zero - lost)


def normal(rng, n, given, lost, errors):
    """Differences of n documents whose means lie `given` and `lost` and have one standard error of `errors`."""
    noise = rng.normal(size=(2, n))
    return given + sqrt(n) * errors * noise[0], lost + sqrt(n) * errors * (0.6 * noise[0] + 0.8 * noise[1])


def fieller(given, lost, level=0.05):
    """The roots of (g - s l)^2 = t^2 var(g - s l), by the textbook."""
    n = len(given)
    t = stats.t.ppf(1 - level / 2, n - 1)
    v = np.cov(given, lost) / n
    g, m = given.mean(), lost.mean()
    a, b, c = m * m - t * t * v[1, 1], -2 * (g * m - t * t * v[0, 1]), g * g - t * t * v[0, 0]
    return a, np.sort(np.roots([a, b, c]).real) if b * b > 4 * a * c else None


@pytest.mark.parametrize("lost", [20.0, 5.0, 1.0, 0.1])
def test_the_set_is_fiellers_where_students_quantiles_are_right(lost):
    rng = np.random.default_rng(int(lost * 10) + 3)
    given, total = normal(rng, 300, 0.3 * lost, lost, 1.0)
    share = share_between(*runs(given, total))
    found = share.within()
    a, roots = fieller(given, total)
    assert share.value == pytest.approx(given.mean() / total.mean())
    if roots is None:
        assert found == ShareSet(-inf, inf)
    else:
        assert found.is_outside == (a < 0)
        for end in (found.low, found.high):  # the shares themselves are ill-conditioned where the set is nearly open
            left = given - end * total
            t = abs(left.mean()) / (left.std(ddof=1) / sqrt(len(left)))
            assert t == pytest.approx(stats.t.ppf(0.975, len(left) - 1), rel=0.03)
    assert found.is_bounded == (a > 0)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_in_the_set_where_the_difference_is_not_real(seed):
    rng = np.random.default_rng(seed)
    given, lost = normal(rng, 60, 0.5 * (seed % 5), 3.0 + seed, 1.0)
    intact, baseline, full = runs(given, lost)
    share, test = share_between(intact, baseline, full), paired_test(intact, baseline)
    for level in (0.2, 0.05, 0.005, 1e-4):
        assert share.within(level).holds(0.0) == (test.p >= level), level


@pytest.mark.parametrize("is_real", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("size", [0.02, 0.3, 0.9])
def test_the_set_follows_another_test_of_the_difference(is_real, sign, size):
    """Accuracies are tested otherwise: their verdict decides where 0 lies."""
    rng = np.random.default_rng(1)
    given, lost = normal(rng, 80, sign * size * 6, 6.0, 1.0)
    found = share_between(*runs(given, lost)).within(0.05, is_real=is_real)
    assert found.holds(0.0) == (not is_real)
    assert found.holds(given.mean() / lost.mean())


def test_a_share_of_windows_is_one_of_log_likelihoods_in_blocks():
    rng = np.random.default_rng(2)
    lost = 0.3 + 0.02 * rng.normal(size=148)
    given = 0.03 + 0.005 * rng.normal(size=148)
    zero = np.full(148, 3.0)
    found = share_between(*(score(values, of_nll=True) for values in (zero - given, zero, zero - lost)))
    assert found.value == pytest.approx(given.mean() / lost.mean())
    low, high = found.within().low, found.within().high
    assert low < 0.1 < high
    assert high - low < 0.02


def test_few_documents_and_no_loss_have_no_share():
    rng = np.random.default_rng(0)
    assert share_between(*runs(*normal(rng, 19, 1.0, 5.0, 0.1))) is None
    assert share_between(*runs(*normal(rng, 20, 1.0, 5.0, 0.1))) is not None
    assert share_between(*runs(np.ones(30), np.zeros(30))) is None
    assert share_between(score(np.zeros(30)), score(np.zeros(30)), score(np.zeros(29))) is None


def test_sets_hold_what_they_say():
    outside = ShareSet(-1.0, 2.0, is_outside=True)
    assert [outside.holds(share) for share in (-2, -1, 0, 2, 3)] == [True, True, False, True, True]
    assert not outside.is_bounded
    assert ShareSet(-1.0, 2.0).holds(0.5)
    assert not ShareSet(-inf, inf).is_bounded


@pytest.mark.parametrize("errors", [2.0, 8.0])
def test_the_set_covers_the_truth(errors):
    """In short; `make statistics` does it at length."""
    rng, trials = np.random.default_rng(9), 200
    covered = 0
    for _ in range(trials):
        covered += share_between(*runs(*normal(rng, 40, 0.3 * errors, errors, 1.0))).within().holds(0.3)
    assert covered / trials == pytest.approx(0.95, abs=0.045)
