"""Statistics against scipy, and against simulation: how often nothing is called something, and what intervals cover."""

from itertools import pairwise
from math import exp

import numpy as np
import pytest
from scipy import stats

from intactkv_eval.report.significance import (
    LEAST,
    holm,
    paired_difference,
    recovered_interval,
    sign_test,
    weighted_difference,
)

TRIALS = 2000


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 1), (30, 51), (400, 310), (7000, 7042)])
def test_the_sign_test_is_scipys(won, lost):
    expected = stats.binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-9)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_a_mean_is_tested_as_students_t_tests_it_where_that_is_right():
    """Normal differences: the bootstrap's interval is Student's."""
    rng = np.random.default_rng(1)
    one = rng.normal(3.0, 0.5, 80)
    other = one + rng.normal(0.05, 0.1, 80)
    found = paired_difference(one, other)
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert found.value == pytest.approx((one - other).mean())
    assert found.stderr == pytest.approx(stats.sem(one - other))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=0.06)
    assert found.p == pytest.approx(expected.pvalue, abs=0.01)
    assert found == paired_difference(one, other), "the same in every run"


def test_a_perplexity_is_tested_as_scipys_bootstrap_tests_it():
    rng = np.random.default_rng(2)
    one = rng.normal(3.0, 0.4, 120)
    other = one + rng.normal(0.02, 0.03, 120)
    found = paired_difference(one, other, of_nll=True)

    def delta(a, b, axis):
        return np.exp(a.mean(axis=axis)) - np.exp(b.mean(axis=axis))

    expected = stats.bootstrap((one, other), delta, paired=True, vectorized=True, rng=np.random.default_rng(0))
    assert found.value == pytest.approx(exp(one.mean()) - exp(other.mean()))
    assert found.stderr == pytest.approx(expected.standard_error, rel=0.04)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval), rel=0.08)


def skewed(rng, n):
    """Window losses: a few documents are far worse than the rest."""
    return rng.gamma(6.0, 0.5, n)


def comparisons(effect, n, kind, trials=TRIALS):
    """Paired runs whose true difference is known, and what the test says of them."""
    rng = np.random.default_rng(n)
    for _ in range(trials):
        if kind == "accuracy":
            level = rng.beta(2, 2, n)
            one = (rng.random(n) < np.clip(level + effect, 0, 1)).astype(float)
            other = (rng.random(n) < level).astype(float)
            yield paired_difference(one, other)
        else:
            shared = skewed(rng, n)
            noise = rng.gamma(2.0, 0.05, n) - 0.1  # skewed, mean 0
            yield paired_difference(shared + noise + effect, shared, kind == "perplexity", resamples=599)


@pytest.mark.parametrize(
    ("kind", "n"), [("mean", 60), ("mean", 148), ("perplexity", 60), ("accuracy", 100), ("accuracy", 400)]
)
def test_where_nothing_is_nothing_is_called(kind, n):
    called = np.mean([found.p < 0.05 for found in comparisons(0.0, n, kind)])
    assert called <= 0.06


@pytest.mark.parametrize(("kind", "n"), [("mean", 60), ("mean", 148), ("accuracy", 400)])
def test_intervals_cover_the_truth(kind, n):
    truth = 0.02
    if kind == "accuracy":
        level = np.random.default_rng(0).beta(2, 2, 10**6)
        truth = float((np.clip(level + 0.02, 0, 1) - level).mean())
    covered = np.mean([found.low <= truth <= found.high for found in comparisons(0.02, n, kind)])
    assert covered == pytest.approx(0.95, abs=0.015)


def test_the_interval_of_a_perplexity_covers_the_truth():
    """delta = exp(m + d) - exp(m), of the population's means."""
    rng = np.random.default_rng(5)
    mean, effect, covered = 3.0, 0.02, 0
    truth = exp(mean + effect) - exp(mean)
    for _ in range(TRIALS):
        shared = rng.normal(mean, 0.35, 60)
        found = paired_difference(shared + rng.normal(effect, 0.03, 60), shared, True, resamples=599)
        covered += found.low <= truth <= found.high
    assert covered / TRIALS == pytest.approx(0.95, abs=0.015)


def test_equal_runs_and_shifted_ones():
    values = list(np.linspace(2, 4, 20))
    same = paired_difference(values, values, True)
    assert (same.value, same.stderr, same.p) == (0, 0, 1)
    shifted = paired_difference([value + 1 for value in range(20)], list(range(20)))
    assert shifted.p == pytest.approx(2**-19)
    few = paired_difference(values[: LEAST - 1], [value + place for place, value in enumerate(values[: LEAST - 1])])
    assert few.stderr > 0
    assert few.p is None, "nothing is called on so few"
    assert paired_difference([1.0], [2.0]) is None


@pytest.mark.parametrize("differing", [2, 3])
def test_few_differences_among_many_ties_are_not_called(differing):
    """Most resamples of so few have no spread at all: they count as far off, not as equal."""
    one = np.full(80, 5.0)
    other = one.copy()
    other[:differing] -= 1.0
    found = paired_difference(one, other)
    assert found.p > 0.05
    assert found.low is None or found.low <= 0


def test_what_is_no_number_is_not_tested():
    values = list(np.linspace(2, 4, 20))
    for bad in (float("nan"), float("inf")):
        broken = [*values[:-1], bad]
        assert paired_difference(broken, values, True) is None
        assert recovered_interval(values, broken, values, True) is None
        assert weighted_difference([(1.0, broken, values)]) is None


def test_weighted_means_of_several_tasks():
    rng = np.random.default_rng(3)
    parts = [
        (0.5, rng.normal(0, 1, 400) + 0.2, rng.normal(0, 1, 400)),
        (0.5, rng.normal(0, 1, 90), rng.normal(0, 1, 90)),
    ]
    found = weighted_difference(parts)
    single = weighted_difference([(1.0, *parts[0][1:])])
    assert single.value == pytest.approx((parts[0][1] - parts[0][2]).mean())
    assert single.stderr == pytest.approx(stats.sem(parts[0][1] - parts[0][2]))
    assert found.value == pytest.approx(sum(0.5 * (one - other).mean() for _, one, other in parts))
    assert found.p == pytest.approx(2 * stats.norm.sf(abs(found.value) / found.stderr))


@pytest.mark.parametrize("differing", [0, 1, 4, 6, 12])
def test_few_differing_documents_of_a_group_are_counted(differing):
    """A normal approximation calls four of two thousand."""
    one, other = np.zeros(1000), np.zeros(1000)
    one[: differing - differing // 2] = 1
    second = np.zeros(1000)
    second[: differing // 2] = 1
    found = weighted_difference([(0.5, one, other), (0.5, second, other)])
    assert found.p == pytest.approx(stats.binomtest(differing, differing).pvalue if differing else 1.0)


def test_holm_bounds_the_chance_of_any_false_call():
    rng = np.random.default_rng(4)
    values = rng.random(9).tolist()
    corrected = holm(values)
    order = np.argsort(values)
    assert all(corrected[a] <= corrected[b] for a, b in pairwise(order))
    assert corrected[order[0]] == pytest.approx(min(1, 9 * values[order[0]]))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    false = np.mean([min(holm(rng.random(12).tolist())) < 0.05 for _ in range(TRIALS)])
    assert false == pytest.approx(0.05, abs=0.015)


def test_the_share_recovered_lies_in_its_interval():
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(400):
        full = rng.normal(3.0, 0.3, 100)
        baseline, intact = full + rng.normal(0.2, 0.03, 100), full + rng.normal(0.14, 0.03, 100)
        low, high = recovered_interval(intact, baseline, full, False, resamples=399)
        covered += low <= 0.3 <= high
    assert covered / 400 == pytest.approx(0.95, abs=0.035)
    assert recovered_interval(full[:3], baseline[:3], full[:3], False) is None
