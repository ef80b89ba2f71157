"""A figure and its differences as the short texts of a table's cells. Knows no files and no markup."""

from math import isfinite
from typing import TypeGuard

from intactkv_eval.report.compare import Delta
from intactkv_eval.report.family import Verdict
from intactkv_eval.report.grid import GridEntry
from intactkv_eval.report.incomplete import share_beside

NO_NUMBER = "no number"  # where a file says NaN, infinity, or what cannot be added up


def figures(entry: GridEntry) -> list[str]:
    """A figure, its differences to baseline and full precision with brackets, and the share recovered."""
    found = entry.found
    if not isfinite(found.score.value):
        return [NO_NUMBER, "", "", ""]
    error = f" ± {found.score.stderr:.4f}" if _is_number(found.score.stderr) else ""
    error += f" (spread {found.score.spread:.4f})" if _is_number(found.score.spread) else ""
    error += share_beside(found.score.settings)
    base = change(found.to_baseline, entry.base) + ("*" if entry.is_significant else "")
    lost = change(found.to_full_precision, entry.fp)
    lost += f", p {chance(entry.fp)}" if entry.fp else ""
    return [f"{found.score.value:.4f}{error}", base, lost, recovered(entry)]


def recovered(entry: GridEntry) -> str:
    """The share in percent with its confidence set, `no loss` where there is nothing to give back, else nothing."""
    share, found = entry.found.share, entry.share
    if share is not None and not entry.found.is_loss:
        return "no loss"
    if share is None or found is None:
        return ""
    low, high = _percent(found.low), _percent(found.high)
    if found.is_outside:
        return f"{_percent(share.value)}% [up to {low}, or from {high} on]"
    return f"{_percent(share.value)}% " + (f"[{low}, {high}]" if found.is_bounded else "[any]")


def _percent(share: float) -> str:
    """With as many digits as it takes not to look like 0."""
    return f"{100 * share:.1f}" if share == 0 or abs(share) >= 0.0005 else f"{100 * share:.0e}"


def chance(verdict: Verdict | None) -> str:
    """The corrected p."""
    if verdict is None:
        return ""
    return f"{verdict.p:.4f}" if verdict.p >= 1e-4 else f"{verdict.p:.0e}" if verdict.p >= 1e-12 else "< 1e-12"


def change(delta: Delta | None, verdict: Verdict | None) -> str:
    """A difference, its standard error and its bracket."""
    if delta is None or not isfinite(delta.value):
        return ""
    error = f" ± {delta.stderr:.4f}" if _is_number(delta.stderr) else ""
    if verdict is None or not (_is_number(verdict.low) and _is_number(verdict.high)):
        return f"{delta.value:+.4f}{error}"
    return f"{delta.value:+.4f}{error} [{_end(verdict.low)}, {_end(verdict.high)}]"


def _end(value: float) -> str:
    """Of a bracket: with as many digits as it takes not to look like 0."""
    return f"{value:+.4f}" if value == 0 or abs(value) >= 0.00005 else f"{value:+.0e}"


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value)
