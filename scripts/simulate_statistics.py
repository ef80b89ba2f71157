"""How often the report's statistics are wrong: coverage, size and power, simulated with the report's own functions.

    python scripts/simulate_statistics.py [--trials 1000] [--only NAME] [--write docs/statistics.md]

Every cell draws `trials` evaluations whose truth is known, hands them to the functions that make the report
(report/pairing.py, report/family.py), and compares one rate with its bounds. The bounds leave room for what `trials`
draws can tell: three standard errors of a rate. Exit code 3 where a rate is out of its bounds.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Any, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from intactkv_eval.report.compare import Delta
from intactkv_eval.report.family import verdicts
from intactkv_eval.report.pairing import paired_test, share_between
from intactkv_eval.report.score import Score
from intactkv_eval.report.share import Share

Random: TypeAlias = np.random.Generator
Values: TypeAlias = NDArray[np.float64]
RESAMPLES = 1999  # the smallest number whose 95% quantile is all its own; a table takes more
TABLE_RESAMPLES = 9999
MARK = "<!-- simulated -->"
TRUE_SHARE = 0.3


def scored(
    values: Any,
    of_nll: bool = False,
    clusters: Any = None,
    weights: Mapping[str, float] | None = None,
    tasks: Sequence[str] | None = None,
) -> Score:
    """A score of these values, as the report reads it from logged samples."""
    tasks = tasks if tasks is not None else ["task"] * len(values)
    places = list(zip(tasks, range(len(values)), strict=True))
    mean = float(np.mean(values))
    return Score(
        task="task",
        metric="perplexity" if of_nll else "acc",
        value=exp(mean) if of_nll else mean,
        stderr=None,
        higher_is_better=not of_nll,
        settings={},
        values=dict(zip(places, np.asarray(values, dtype=float).tolist(), strict=True)),
        of_nll=of_nll,
        weights=weights or {},
        clusters={} if clusters is None else dict(zip(places, map(str, clusters), strict=True)),
    )


def noise(draw: Random, kind: str, size: int) -> Values:
    """Mean 0, variance 1."""
    if kind == "normal":
        return draw.normal(size=size)
    if kind == "gamma":
        return (draw.gamma(2.0, 1.0, size) - 2.0) / sqrt(2.0)
    return (draw.lognormal(0.0, 1.0, size) - exp(0.5)) / sqrt((exp(1.0) - 1.0) * exp(1.0))


def correlated(draw: Random, n: int, r: float) -> Values:
    """AR(1) with lag-1 correlation r, mean 0, variance 1."""
    values = draw.normal(size=n)
    for place in range(1, n):
        values[place] = r * values[place - 1] + sqrt(1 - r * r) * values[place]
    return values


def called(values: Values, **options: Any) -> bool:
    """Whether the difference of these values to 0 is called real by itself."""
    found = paired_test(scored(values, **options), scored(np.zeros(len(values)), **options), RESAMPLES)
    return found is not None and found.p is not None and found.p < 0.05


def documents(draw: Random, n: int, kind: str, effect: float = 0.0) -> bool:
    """Independent documents; effect in standard errors."""
    return called(noise(draw, kind, n) + effect / sqrt(n))


def windows(draw: Random, n: int, r: float, effect: float = 0.0) -> bool:
    """Windows of one text; effect in standard errors of the mean of n independent ones."""
    return called(correlated(draw, n, r) + effect / sqrt(n), of_nll=True)


def clusters(draw: Random, number: int, size: int, icc: float, effect: float = 0.0) -> bool:
    """`number` passages with about `size` questions each, of intraclass correlation `icc`."""
    labels = np.repeat(np.arange(number), draw.integers(size - 1, size + 2, number))
    values = sqrt(icc) * draw.normal(size=number)[labels] + sqrt(1 - icc) * draw.normal(size=len(labels))
    return called(values + effect / sqrt(number), clusters=labels)


def answers(draw: Random, n: int, gain: float = 0.0) -> bool:
    """Right and wrong answers of two runs to questions of different difficulty."""
    level = draw.beta(2, 2, n)
    one, other = (draw.random(n) < np.clip(level + gain, 0, 1)), (draw.random(n) < level)
    found = paired_test(scored(one.astype(float)), scored(other.astype(float)), RESAMPLES)
    return found.p < 0.05


def group(draw: Random, kind: str, effect: float = 0.0) -> bool:
    """Seven tasks of very different sizes, weighted alike."""
    sizes = {"a": 12, "b": 20, "c": 40, "d": 60, "e": 100, "f": 200, "g": 400}
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    error = sqrt(sum(1 / size for size in sizes.values())) / len(sizes)
    weights = dict.fromkeys(sizes, 1 / len(sizes))
    return called(noise(draw, kind, len(tasks)) + effect * error, weights=weights, tasks=tasks)


def perplexity(draw: Random, n: int) -> bool:
    """A small change of windows that differ far more from each other: its power, and none is lost by exp."""
    level = 3.0 + 0.5 * draw.normal(size=n)
    change = -0.002 + 0.004 * draw.normal(size=n)
    one, other = scored(level + change, of_nll=True), scored(level, of_nll=True)
    return paired_test(one, other, RESAMPLES).p < 0.05


def interval(draw: Random, n: int, kind: str) -> bool:
    """Whether the interval of a mean holds it."""
    found = paired_test(scored(noise(draw, kind, n) + 0.2), scored(np.zeros(n)), RESAMPLES)
    low, high = found.interval()
    return low <= 0.2 <= high


def _shared(draw: Random, n: int, errors: float, kind: str) -> Share | None:
    """Intact, baseline and full precision: a loss of `errors` standard errors, 30% of it given back."""
    lost = errors / sqrt(n) + noise(draw, kind, n)
    given = TRUE_SHARE * errors / sqrt(n) + 0.3 * (lost - errors / sqrt(n)) + 0.2 * noise(draw, kind, n)
    base = np.zeros(n)
    return share_between(scored(base - given), scored(base), scored(base - lost), RESAMPLES)


def share(draw: Random, n: int, errors: float, kind: str) -> bool:
    """Whether the set of the share holds it."""
    found = _shared(draw, n, errors, kind)
    return found is not None and found.within().holds(TRUE_SHARE)


def shown(draw: Random, n: int, errors: float, kind: str) -> bool:
    """Whether the share that is shown lies above the true one: half of the time where nothing selects."""
    found = _shared(draw, n, errors, kind)
    return found is not None and found.value > TRUE_SHARE


def table(draw: Random, cells: int, n: int) -> bool:
    """Whether a table of cells without any effect has a star, or a bracket of a share that leaves out 0."""
    full = 3.0 + 0.3 * draw.normal(size=n)
    deltas, shares = {}, {}
    for cell in range(cells):
        lost = full + 0.2 + 0.02 * draw.normal(size=n)
        kept = lost + 0.02 * draw.normal(size=n)
        intact, baseline, whole = (scored(values, of_nll=True) for values in (kept, lost, full))
        test = paired_test(intact, baseline, TABLE_RESAMPLES)
        deltas[cell] = Delta(intact.value - baseline.value, None, test, baseline.value)
        shares[cell] = (intact, baseline, whole)
    said = verdicts(deltas, dict.fromkeys(deltas, "one family"))
    if not any(one.low > 0 or one.high < 0 or one.is_real for one in said.values()):
        nearest = min(said, key=lambda cell: said[cell].p)
        found = share_between(*shares[nearest], TABLE_RESAMPLES)
        return not found.within(said[nearest].level).holds(0.0)
    return True


@dataclass(frozen=True)
class Cell:
    """One rate. of: what is measured. low, high: its bounds. every: the trials are divided by it, in slow cells."""

    name: str
    of: str
    make: Callable[..., bool]
    arguments: tuple[Any, ...]
    low: float
    high: float
    every: int = 1

    def trials(self, asked: int) -> int:
        """How many are drawn."""
        return max(20, asked // self.every)

    def rate(self, asked: int) -> float:
        """The rate over its trials; the same in every run."""
        count = self.trials(asked)
        own = crc32(self.name.encode())
        return sum(self.make(np.random.default_rng([own, trial]), *self.arguments) for trial in range(count)) / count

    def bounds(self, asked: int) -> tuple[float, float]:
        """With three standard errors of a rate on either side."""
        count = self.trials(asked)
        return tuple(
            end + sign * 3 * sqrt(max(end * (1 - end), 0.0) / count) if 0 < end < 1 else end
            for end, sign in ((self.low, -1), (self.high, 1))
        )


def cells() -> list[Cell]:
    """All of them: what the docs page shows."""
    found = []
    for n in (20, 60, 200):
        for kind, high in (("normal", 0.055), ("gamma", 0.065), ("lognormal", 0.10)):
            found.append(Cell(f"documents, n = {n}, {kind}", "size", documents, (n, kind), 0.0, high))
    for n in (8, 19):
        found.append(Cell(f"documents, n = {n}, lognormal", "size", documents, (n, "lognormal"), 0.0, 0.0))
    for n in (60, 148, 300):
        for r in (0.0, 0.2, 0.35, 0.5):
            found.append(Cell(f"windows, n = {n}, AR(1) of {r}", "size", windows, (n, r), 0.0, 0.065))
    found.append(Cell("windows, n = 20, AR(1) of 0.5", "size", windows, (20, 0.5), 0.0, 0.075))
    for number, size, icc in ((20, 10, 0.3), (40, 5, 0.2), (40, 5, 0.3), (40, 10, 0.3), (100, 10, 0.2)):
        name = f"{number} clusters of about {size}, ICC {icc}"
        found.append(Cell(name, "size", clusters, (number, size, icc), 0.0, 0.06))
    for n in (100, 400):
        found.append(Cell(f"answers, n = {n}", "size", answers, (n,), 0.0, 0.05))
    for kind in ("normal", "gamma"):
        found.append(Cell(f"group of seven tasks, {kind}", "size", group, (kind,), 0.0, 0.06))
    found.append(Cell("ten cells without effect, any star or bracket", "size", table, (10, 60), 0.0, 0.05, every=2))
    found.append(Cell("perplexity of 60 windows, nll - 0.002", "power", perplexity, (60,), 0.85, 1.0))
    found.append(Cell("documents, n = 200, three standard errors", "power", documents, (200, "normal", 3.0), 0.8, 1.0))
    found.append(Cell("windows, n = 148, five standard errors", "power", windows, (148, 0.2, 5.0), 0.85, 1.0))
    found.append(Cell("answers, n = 400, 10 points", "power", answers, (400, 0.1), 0.75, 1.0))
    for n in (20, 60, 200, 1000):
        found.append(Cell(f"difference, n = {n}, normal", "coverage", interval, (n, "normal"), 0.94, 0.96))
    for kind, low, high in (("normal", 0.93, 0.97), ("gamma", 0.90, 0.98), ("lognormal", 0.80, 0.98)):
        for n in (20, 60, 200, 1000):
            for errors in (2, 5, 20):
                name = f"share, n = {n}, loss of {errors} se, {kind}"
                found.append(Cell(name, "coverage", share, (n, errors, kind), low, high))
    found.append(Cell("share shown above the true one, loss of 2 se", "half", shown, (60, 2, "normal"), 0.46, 0.54))
    return found


def measured(task: tuple[int, int]) -> float:
    """Of a cell's number and the trials asked for: its rate."""
    number, trials = task
    return cells()[number].rate(trials)


def lines(trials: int, only: str) -> tuple[list[str], int]:
    """The table's lines, and how many cells are out of their bounds."""
    chosen = [(number, cell) for number, cell in enumerate(cells()) if not only or only in f"{cell.name} {cell.of}"]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rates = list(pool.map(measured, [(number, trials) for number, _ in chosen]))
    rows = ["| simulated | rate of | trials | found | bounds | |", "| --- | --- | ---: | ---: | --- | --- |"]
    wrong = 0
    for (_, cell), rate in zip(chosen, rates, strict=True):
        low, high = cell.bounds(trials)
        is_right = low <= rate <= high
        wrong += not is_right
        said = f"{cell.low:g} to {cell.high:g} | {'' if is_right else 'out of bounds'}"
        rows.append(f"| {cell.name} | {cell.of} | {cell.trials(trials)} | {rate:.3f} | {said} |")
    return rows, wrong


def main() -> None:
    """Print the table; exit code 3 where a rate is out of its bounds."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--trials", type=int, default=1000)
    options.add_argument("--only", default="", help="cells whose name holds this")
    options.add_argument("--write", type=Path, help="put the table between the marks of this page")
    asked = options.parse_args()
    rows, wrong = lines(asked.trials, asked.only)
    print("\n".join(rows))
    if asked.write and not wrong:
        head, _, rest = asked.write.read_text(encoding="utf-8").partition(MARK)
        _, _, tail = rest.partition(MARK)
        asked.write.write_text(f"{head}{MARK}\n" + "\n".join(rows) + f"\n{MARK}{tail}", encoding="utf-8")
    if wrong:
        print(f"{wrong} rates are out of their bounds", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    main()
