"""What stands below a table: what its columns mean, what was resampled, and how many differences were tested."""

from collections.abc import Iterable, Sequence

from intactkv_eval.report.grid import Column, Grid, GridEntry
from intactkv_eval.report.pairing import unit_of
from intactkv_eval.report.significance import MIN_ERROR, MIN_TEST

MEANING = f"""\
`pivot` none: the pivot's tokens stand in front but are computed by the evaluated model (the baseline); otherwise their
KV is the full-precision model's. Δ base: the difference to the same cell's baseline; of a checkpoint that was
calibrated behind the pivot, to the plainly calibrated one's baseline. Δ fp: the difference to full precision. ±: one
standard error over documents (windows, clusters), paired where both runs logged them, from {MIN_ERROR} on; spread:
standard deviation over seeds. Brackets and stars, from {MIN_TEST} on: all brackets of one kind in a column hold
together with 95% for the cells of one model (Bonferroni; cells in full precision are controls and not tested), and
\\* stands exactly where the bracket of Δ base leaves out 0. p, of Δ fp: corrected in the same way. recovered: the share
of the baseline's loss to full precision that the intact pivot gives back, of log-likelihoods where the figure is a
perplexity; its bracket leaves out 0 exactly where there is a \\*, and is written as open where it is (any: all shares
are possible); "no loss": the baseline is no worse than full precision. Perplexities are tested on log-likelihoods. All
of it is over the documents of one evaluation: other calibration data, or seeds of calibration, are not in it."""

STALE = (
    "Stale: measured by an older revision of a formula, and compared with nothing of another revision. Run these cells "
    "again:"
)
_KINDS = (("Δ base", "base"), ("Δ fp", "fp"), ("Δ plain", "plain"), ("Δ bos", "bos"))


def testing(grid: Grid) -> list[str]:
    """Of each column: the units that are resampled, the tests that were made, and how many stand together."""
    columns: dict[Column, list[GridEntry]] = {column: [] for column in grid.columns}
    for row in grid.rows:
        for column, entry in row.entries.items():
            columns[column].append(entry)
    return [_of_column(grid.titles[column], entries) for column, entries in columns.items()]


def _of_column(title: str, entries: Sequence[GridEntry]) -> str:
    units = _different(unit_of(entry.found.score) for entry in entries)
    counts = [
        f"{', '.join(map(str, tests))} of {name}"
        for name, kind in _KINDS
        if (tests := sorted({verdict.tests for entry in entries if (verdict := getattr(entry, kind))}))
    ]
    methods = _different(method for entry in entries for method in _methods(entry))
    if not units:
        return f"{title}: no samples were logged, so nothing is tested (--log_samples)"
    said = f"{title}: resampled units: {'; '.join(units)}"
    if counts:
        said += f"; differences tested together: {', '.join(counts)}; by {' and '.join(methods)}"
    return said


def _methods(entry: GridEntry) -> list[str]:
    deltas = (entry.found.to_baseline, entry.found.to_full_precision, entry.found.to_plain, entry.found.to_bos)
    return [delta.test.method for delta in deltas if delta and delta.test and delta.test.p is not None]


def _different(texts: Iterable[str]) -> list[str]:
    return sorted({text for text in texts if text and text != "equal differences"})
