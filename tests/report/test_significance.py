"""The tests of paired differences against scipy, against each other, and in short simulations."""

from math import exp

import numpy as np
import pytest
from helpers.scores import score
from scipy import stats

from intactkv_eval.report.pairing import paired_test, standard_error
from intactkv_eval.report.significance import MIN_ERROR, MIN_TEST, Tail, accuracy_test, sign_test

LEVELS = (0.5, 0.1, 0.05, 0.01, 0.002, 1e-4, 1e-7)


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (5, 1), (30, 51), (400, 310), (7000, 7042)])
def test_the_sign_test_is_scipys(won, lost):
    expected = stats.binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-9)
    assert sign_test(won, lost) == sign_test(lost, won)


def test_a_mean_is_tested_as_students_t_tests_it_where_that_is_right():
    """Normal differences: the bootstrap's interval is Student's, at every level, and so is p in the far tail."""
    rng = np.random.default_rng(1)
    one = rng.normal(3.0, 0.5, 80)
    other = one + rng.normal(0.05, 0.1, 80)
    found = paired_test(score(one), score(other))
    expected = stats.ttest_rel(one, other)
    assert found.value == pytest.approx((one - other).mean())
    assert found.stderr == pytest.approx(stats.sem(one - other))
    for level in (0.1, 0.05, 0.005, 1e-4):
        interval = expected.confidence_interval(1 - level)
        assert found.interval(level) == pytest.approx((interval.low, interval.high), rel=0.1)
    far = paired_test(score(one), score(other + 1))
    assert found.p == pytest.approx(expected.pvalue, rel=0.5)
    assert np.log(far.p) == pytest.approx(np.log(stats.ttest_rel(one, other + 1).pvalue), rel=0.15), "no floor of p"
    assert found == paired_test(score(one), score(other)), "the same in every run"


def pairs():
    """Differences of every kind that is tested, real ones and none."""
    rng = np.random.default_rng(3)
    for effect in (0.0, 0.02, 0.1, 0.3):
        noise = rng.normal(effect, 0.3, 60)
        yield score(noise), score(np.zeros(60))
        yield score(noise, of_nll=True), score(np.zeros(60), of_nll=True)
        yield score(noise, clusters=np.arange(60) // 3), score(np.zeros(60), clusters=np.arange(60) // 3)
        parts = {"weights": {"a": 0.3, "b": 0.7}, "tasks": ["a"] * 25 + ["b"] * 35}
        yield score(noise, **parts), score(np.zeros(60), **parts)
        yield score((rng.random(60) < 0.5 + effect).astype(float)), score((rng.random(60) < 0.5).astype(float))


@pytest.mark.parametrize("number", range(20))
def test_p_and_interval_never_contradict_each_other(number):
    one, other = list(pairs())[number]
    found = paired_test(one, other)
    for level in LEVELS:
        low, high = found.interval(level)
        assert (found.p < level) == (low > 0 or high < 0), level
    near = found.p * 0.999, min(1.0, found.p * 1.001)
    said = [low > 0 or high < 0 for low, high in map(found.interval, near)]
    assert said == [False, True], "the interval reaches 0 at p itself"


@pytest.mark.parametrize("n", [20, 60, 400])
def test_answers_have_one_verdict_whatever_they_are(n):
    """McNemar's exact test and Bonett-Price's interval differ near the border: what is said of both is one thing."""
    for won in range(0, 20):
        for lost in range(0, min(20, n - won + 1)):
            one, other = np.zeros(n), np.zeros(n)
            one[:won] = 1
            other[won : won + lost] = 1
            found = accuracy_test(one, other)
            for level in (0.05, 0.03, 0.0571, found.p * 0.999, min(1.0, found.p * 1.001)):
                low, high = found.interval(level)
                assert (found.p < level) == (low > 0 or high < 0), (won, lost, level)


def test_quantiles_and_p_are_one_function_across_the_joint():
    tail = Tail(np.abs(np.random.default_rng(0).standard_t(12, 999)), 12)
    levels = np.geomspace(0.5, 1e-12, 200)
    sizes = [tail.quantile(level) for level in levels]
    assert sizes == sorted(sizes)
    assert [tail.exceeded(size) for size in sizes] == pytest.approx(levels, rel=0.01)


def test_windows_are_resampled_in_blocks():
    """Of correlated windows a plain standard error is too small by a known factor."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    for place in range(1, 4000):
        noise[place] += 0.5 * noise[place - 1]
    plain, blocks = standard_error(score(noise)), standard_error(score(noise, of_nll=True))
    assert plain == pytest.approx(stats.sem(noise))
    assert blocks / plain == pytest.approx(3**0.5, rel=0.12), "sqrt((1 + r) / (1 - r)) of r = 0.5"
    mixed = rng.permutation(noise)
    assert standard_error(score(mixed, of_nll=True)) == pytest.approx(standard_error(score(mixed)), rel=0.12)


def test_clusters_are_resampled_whole():
    """Against the cluster-robust variance of a mean, of clusters of different sizes."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    values = rng.normal(size=40)[labels] + 0.1 * rng.normal(size=len(labels))
    rest = values - values.mean()
    sums = np.array([rest[labels == label].sum() for label in range(40)])
    expected = np.sqrt(40 / 39 * (sums**2).sum()) / len(values)
    assert standard_error(score(values, clusters=labels)) == pytest.approx(expected)
    found = paired_test(score(values, clusters=labels), score(np.zeros(len(values)), clusters=labels))
    assert (found.stderr, found.units) == (pytest.approx(expected), 40)
    assert standard_error(score(values, clusters=np.arange(len(values)))) == pytest.approx(stats.sem(values))


def test_right_and_wrong_answers_of_one_passage_are_not_mcnemars():
    right = np.zeros(60)
    right[:12] = 1.0  # twelve answers to one passage
    alone = paired_test(score(right), score(np.zeros(60)))
    together = paired_test(
        score(right, clusters=np.arange(60) // 12), score(np.zeros(60), clusters=np.arange(60) // 12)
    )
    assert alone.p < 0.001
    assert together is None, "five passages"
    many = np.tile(right, 5)
    labels = np.arange(300) // 12
    found = paired_test(score(many, clusters=labels), score(np.zeros(300), clusters=labels))
    assert (found.units, found.method) == (25, "bootstrap-t over clusters")
    assert found.p > 1e-3 > paired_test(score(many), score(np.zeros(300))).p


@pytest.mark.parametrize(("units", "has_error", "is_tested"), [(7, False, False), (8, True, False), (20, True, True)])
@pytest.mark.parametrize("kind", ["mean", "accuracy", "windows", "clusters"])
def test_few_units_have_no_error_and_no_test(kind, units, has_error, is_tested):
    assert (MIN_ERROR, MIN_TEST) == (8, 20)
    rng = np.random.default_rng(0)
    options = {"windows": {"of_nll": True}, "clusters": {"clusters": np.arange(3 * units) // 3}}.get(kind, {})
    values = rng.normal(size=3 * units if kind == "clusters" else units)
    values = (values > 0).astype(float) if kind == "accuracy" else values
    found = paired_test(score(values, **options), score(np.zeros(len(values)), **options))
    assert (found is not None) == has_error
    if found is not None:
        assert (found.p is not None, found.interval() is not None, found.units) == (is_tested, is_tested, units)
    assert (standard_error(score(values, **options)) is not None) == has_error


def test_equal_runs_and_shifted_ones():
    values = np.linspace(2, 4, 20)
    same = paired_test(score(values, of_nll=True), score(values, of_nll=True))
    assert (same.value, same.stderr, same.p, same.interval()) == (0, 0, 1, (0, 0))
    shifted = paired_test(score(values + 1), score(values))
    assert (shifted.p, shifted.interval()) == (pytest.approx(2**-19), pytest.approx((1, 1)))


@pytest.mark.parametrize("differing", [2, 3])
def test_few_differences_among_many_ties_are_not_called(differing):
    """Most resamples of so few have no spread at all: they count as far off, not as equal."""
    one = np.full(80, 5.0)
    other = one.copy()
    other[:differing] -= 1.0
    found = paired_test(score(one), score(other))
    interval = found.interval()
    assert found.p > 0.05
    assert interval is None or interval[0] <= 0


def test_what_is_no_number_is_not_tested():
    values = np.linspace(2, 4, 20)
    for bad in (float("nan"), float("inf")):
        broken = score([*values[:-1], bad], of_nll=True)
        assert paired_test(broken, score(values, of_nll=True)) is None
        assert standard_error(broken) is None
    assert paired_test(score([1.0]), score([2.0])) is None
    assert paired_test(score([]), score([])) is None
    assert paired_test(score(values), score(values[:-1])) is None


def test_a_group_is_a_weighted_sum_over_its_tasks():
    rng = np.random.default_rng(3)
    sizes = {"large": 400, "middle": 90, "small": 5}
    weights = {"large": 0.5, "middle": 0.3, "small": 0.2}
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    one, other = rng.normal(0.1, 1, len(tasks)), rng.normal(0, 1, len(tasks))
    found = paired_test(*(score(part, weights=weights, tasks=tasks) for part in (one, other)))
    change = {task: (one - other)[np.array(tasks) == task] for task in sizes}
    assert found.value == pytest.approx(sum(weights[task] * change[task].mean() for task in sizes))
    known = sum((weights[task] * stats.sem(change[task])) ** 2 for task in sizes)
    assert found.stderr == pytest.approx(known**0.5, rel=0.02), "a task of five documents leaves the error paired"
    assert found.method == "bootstrap-t over documents, by task"
    one_document = ["large"] * 400 + ["small"]
    weights_of_two = {"large": 0.5, "small": 0.5}
    lone = paired_test(*(score(part[:401], weights=weights_of_two, tasks=one_document) for part in (one, other)))
    assert lone.value == pytest.approx(0.5 * (one - other)[:400].mean() + 0.5 * (one - other)[400])
    assert lone.stderr > 0, "a task of one document has no spread of its own"
    small = [task for task in sizes if task != "large" for _ in range(4)]
    assert paired_test(score(one[:8], weights=weights, tasks=small), score(other[:8], weights=weights, tasks=small))


def test_the_interval_of_a_perplexity_is_that_of_its_log_likelihood(tmp_path):
    from intactkv_eval.report.compare import Delta

    rng = np.random.default_rng(5)
    shared = rng.normal(3.0, 0.35, 60)
    one, other = score(shared + rng.normal(0.02, 0.03, 60), of_nll=True), score(shared, of_nll=True)
    test = paired_test(one, other)
    delta = Delta(one.value - other.value, None, test, other.value)
    low, high = delta.interval(0.05)
    assert low < delta.value < high
    assert (other.value + low, other.value + high) == pytest.approx(
        [other.value * exp(end) for end in test.interval(0.05)]
    )
    level = rng.normal(0.0, 30.0, 60)  # how hard each window is has nothing to do with the difference
    assert paired_test(score(shared + level + 0.02, of_nll=True), score(shared + level, of_nll=True)).p < 1e-5


def skewed(rng, size):
    return rng.gamma(2.0, 0.05, size) - 0.1


@pytest.mark.parametrize("kind", ["documents", "windows", "clusters", "answers", "group"])
def test_where_nothing_is_nothing_is_called(kind):
    """In short; `make statistics` does it at length."""
    rng, trials, called = np.random.default_rng(7), 300, 0
    for _ in range(trials):
        if kind == "documents":
            found = paired_test(score(skewed(rng, 60)), score(np.zeros(60)))
        elif kind == "windows":
            values = rng.normal(size=148)
            for place in range(1, 148):
                values[place] += 0.35 * values[place - 1]
            found = paired_test(score(values, of_nll=True), score(np.zeros(148), of_nll=True))
        elif kind == "clusters":
            labels = np.arange(200) // 5
            values = 0.5 * rng.normal(size=40)[labels] + rng.normal(size=200)
            found = paired_test(score(values, clusters=labels), score(np.zeros(200), clusters=labels))
        elif kind == "answers":
            found = paired_test(*(score((rng.random(150) < 0.5).astype(float)) for _ in range(2)))
        else:
            parts = {"weights": {"a": 0.5, "b": 0.5}, "tasks": ["a"] * 20 + ["b"] * 100}
            found = paired_test(score(skewed(rng, 120), **parts), score(np.zeros(120), **parts))
        called += found.p < 0.05
    assert called / trials <= 0.09, "0.05 and three standard errors"
