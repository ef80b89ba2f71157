"""The grid as text: markdown, CSV, LaTeX and JSON. The same runs give the same bytes."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import Any, TypeGuard

from intactkv_eval.messages import clean, on_one_line, struck, struck_record
from intactkv_eval.report.collect import Run
from intactkv_eval.report.compare import Delta
from intactkv_eval.report.grid import Entry, Grid, grid_of
from intactkv_eval.report.planned import Absent
from intactkv_eval.report.published import beside, published_rows
from intactkv_eval.report.score import Score

HEAD = ("model", "weights", "kv", "pivot")
NO_NUMBER = "no number"  # where a file says NaN, infinity, or what cannot be added up
_MARKUP = re.compile(r"[\\|<*`]|(?<=\])\(")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the full-width signs too, which spreadsheets take alike
_PARTS = ("Δ base", "Δ fp", "recovered")
NOTES = """\
`pivot` none: the pivot's tokens stand in front but are computed by the evaluated model (the baseline); otherwise their
KV is the full-precision model's. Δ base: to the same cell's baseline. Δ fp: to full precision. ±: one standard error,
of a Δ paired over documents where both runs logged them; spread: standard deviation over seeds. \\*: a Δ base that is
significant at 5% after Holm's correction over the table (paired bootstrap-t; McNemar's exact test for accuracies).
recovered: share of the baseline's loss to full precision that the intact pivot gives back, with its 95% interval; empty
where that loss is not significant, or within two standard errors."""

STALE = (
    "Stale: measured by an older revision of a formula, and compared with nothing of another revision. Run these cells "
    "again:"
)


def markdown(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """The table of all runs, what it means, and what was not compared. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    header = [*HEAD, *(name for column in grid.columns for name in (grid.titles[column], *_PARTS))]
    lines = [markdown_row(header), markdown_row(["---"] * len(HEAD) + ["---:"] * (len(header) - len(HEAD)))]
    lines += [markdown_row(row) for row in _texts(grid)]
    refused = [f"- {_marked_down(line)}" for line in grid.refusals]
    said = ["", "Not compared with a baseline:", *refused] if refused else []
    said += ["", STALE, *(f"- {_marked_down(line)}" for line in grid.stale)] if grid.stale else []
    said += (
        ["", "Missing or failed cells of a sweep:", *(f"- {_marked_down(line)}" for line in grid.gaps)]
        if grid.absent
        else []
    )
    rows = [markdown_row(row) for row in published_rows(beside(grid))]
    rule = markdown_row(["---"] * 5 + ["---:"] * 3 + ["---"] * 2)
    printed = ["", "Beside published figures:", "", *rows[:1], rule, *rows[1:]]
    return "\n".join([*lines, "", NOTES, *_aware(grid), *_longer(grid), *said, *(printed if rows else []), ""])


def _aware(grid: Grid) -> list[str]:
    """Checkpoints that were calibrated behind the pivot against plain ones."""
    said = "Calibrated behind the pivot, against the same calibration without it; both measured behind that pivot:"
    return _pairs(
        grid, said, ("behind the pivot", "plain"), lambda one: (one.found.plain, one.found.to_plain, one.p_plain)
    )


def _longer(grid: Grid) -> list[str]:
    """Pivots against [BOS] alone."""
    said = "Other pivots against [BOS] alone, both intact; what the tokens themselves do is in the difference:"
    return _pairs(grid, said, ("this pivot", "bos"), lambda one: (one.found.bos, one.found.to_bos, one.p_bos))


_Pair = tuple[Score | None, Delta | None, float | None]


def _pairs(grid: Grid, said: str, names: tuple[str, str], of: Callable[[Entry], _Pair]) -> list[str]:
    """A table of the figures that have a partner of one kind: score, difference, corrected p."""
    rows = []
    for row in grid.rows:
        for column, entry in row.entries.items():
            other, delta, p = of(entry)
            if other is not None:
                values = [f"{entry.found.score.value:.4f}", f"{other.value:.4f}", _delta(delta)]
                rows.append([*row.labels, grid.titles[column], *values, "" if p is None else f"{p:.4f}"])
    if not rows:
        return []
    header = [*HEAD, "measured", *names, "difference", "p (Holm)"]
    rule = markdown_row(["---"] * 5 + ["---:"] * 4)
    return ["", said, "", markdown_row(header), rule, *map(markdown_row, rows)]


def latex(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """A tabular of booktabs. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    header = [*HEAD, *(name for column in grid.columns for name in (grid.titles[column], *_PARTS))]
    lines = [
        f"\\begin{{tabular}}{{{'l' * len(HEAD)}{'r' * (len(header) - len(HEAD))}}}",
        "\\toprule",
        _row(header),
        "\\midrule",
        *(_row(row) for row in _texts(grid)),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return "\n".join([*lines, ""])


def comma_separated(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """One line for each figure, numbers as they are. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    made = io.StringIO()
    rows = [{**dict(zip(HEAD, row.labels, strict=True)), **_numbers(grid.titles[column], entry), "status": "done"}
            for row in grid.rows for column, entry in row.entries.items()]  # fmt: skip
    writer = csv.DictWriter(made, list(rows[0]), lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(map(_spread_out, rows))
    writer.writerows(_spread_out({key: one[key] for key in (*HEAD, "task", "status")}) for one in absent_records(grid))
    return made.getvalue()


def _spread_out(row: Mapping[str, object]) -> dict[str, object]:
    """A line that a spreadsheet takes for texts and numbers: one line, and no text that begins as a formula does."""
    texts = {key: shown(value) for key, value in row.items() if isinstance(value, str)}
    return {**row, **{key: f"'{text}" if text.lstrip().startswith(_FORMULA) else text for key, text in texts.items()}}


def as_json(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """Every figure with its tests and settings. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    return json.dumps([*records(grid), *absent_records(grid)], indent=1, ensure_ascii=False) + "\n"


def absent_records(grid: Grid) -> list[dict[str, object]]:
    """What sweeps lack, as values that JSON can hold."""
    return [
        _storable(
            {
                **dict(zip(HEAD, labels, strict=True)),
                "task": one.task,
                "seed": one.seed,
                "status": one.word,
                "error": None if one.word == one.why else one.why,
            }
        )
        for labels, one in grid.absent
    ]


def records(grid: Grid) -> list[dict[str, object]]:
    """Every figure as values that JSON can hold."""
    return [
        _storable(
            {
                "cell": row.identity.cell.model_dump(mode="json"),
                "hf_arguments": dict(row.identity.hf_arguments),
                "checkpoint": row.identity.checkpoint,
                "formulas": dict(row.identity.formulas),
                "stale": row.identity.stale,
                "pivot_tokens": entry.run.pivot_tokens,
                **dict(zip(HEAD, row.labels, strict=True)),
                **_figures(grid.titles[column], entry),
                "higher_is_better": entry.found.score.higher_is_better,
                "settings": entry.found.score.settings,
                "unpaired": entry.unpaired,
                "status": "done",
            }
        )
        for row in grid.rows
        for column, entry in row.entries.items()
    ]


def _numbers(title: str, entry: Entry) -> dict[str, object]:
    """What is no number (NaN, infinite) is None: JSON has no word for it."""
    return {key: _storable(value) for key, value in _figures(title, entry).items()}


def _storable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _storable(part) for key, part in struck_record(value).items()}
    if isinstance(value, list | tuple):
        return [_storable(part) for part in value]
    if isinstance(value, str):
        return clean(value)
    return None if isinstance(value, float) and not isfinite(value) else value


def _figures(title: str, entry: Entry) -> dict[str, object]:
    found, score = entry.found, entry.found.score
    low, high = found.recovered_interval or (None, None)
    test = found.to_baseline.test if found.to_baseline else None
    return {
        "column": title,
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        "stderr": score.stderr,
        "spread": score.spread,
        **_delta_numbers("delta_base", found.to_baseline),
        "delta_base_p": test.p if test else None,
        "delta_base_p_holm": entry.p,
        "delta_base_significant": entry.is_significant,
        "delta_base_test": test.method if test else None,
        "documents": test.documents if test else None,
        **_delta_numbers("delta_fp", found.to_full_precision),
        **_delta_numbers("delta_plain", found.to_plain),
        "delta_plain_p_holm": entry.p_plain,
        **_delta_numbers("delta_bos", found.to_bos),
        "delta_bos_p_holm": entry.p_bos,
        "recovered": found.recovered,
        "recovered_low": low,
        "recovered_high": high,
    }


def _delta_numbers(name: str, delta: Delta | None) -> dict[str, object]:
    test = delta.test if delta else None
    return {
        name: delta.value if delta else None,
        f"{name}_stderr": delta.stderr if delta else None,
        f"{name}_low": test.low if test else None,
        f"{name}_high": test.high if test else None,
    }


def _texts(grid: Grid) -> list[list[str]]:
    empty = [""] * len(_PARTS)
    rows = []
    for row in grid.rows:
        texts = [figures(row.entries[column]) if column in row.entries else [grid.gap(row, column), *empty]
                 for column in grid.columns]  # fmt: skip
        rows.append([*row.labels, *(text for part in texts for text in part)])
    return rows


def figures(entry: Entry) -> list[str]:
    """A figure, its differences to baseline and full precision, and the share recovered."""
    found = entry.found
    if not isfinite(found.score.value):
        return [NO_NUMBER, "", "", ""]
    error = f" ± {found.score.stderr:.4f}" if _is_number(found.score.stderr) else ""
    error += f" (spread {found.score.spread:.4f})" if _is_number(found.score.spread) else ""
    recovered = "" if found.recovered is None else f"{100 * found.recovered:.0f}%"
    if found.recovered_interval:
        recovered += " [{:.0f}, {:.0f}]".format(*(100 * end for end in found.recovered_interval))
    base = _delta(found.to_baseline) + ("*" if entry.is_significant else "")
    return [f"{found.score.value:.4f}{error}", base, _delta(found.to_full_precision), recovered]


def _delta(delta: Delta | None) -> str:
    if delta is None or not isfinite(delta.value):
        return ""
    return f"{delta.value:+.4f}" + (f" ± {delta.stderr:.4f}" if _is_number(delta.stderr) else "")


def _is_number(value: float | None) -> TypeGuard[float]:
    return value is not None and isfinite(value)


def markdown_row(values: Sequence[str]) -> str:
    """One line of a markdown table; names are texts there, whatever they hold."""
    return "| " + " | ".join(map(_marked_down, values)) + " |"


def shown(text: str) -> str:
    """A text of a run on one line, without control characters and credentials."""
    return struck(on_one_line(text))


def _marked_down(text: str) -> str:
    """On one line, and without markup of its own."""
    return _MARKUP.sub(r"\\\g<0>", shown(text))


def _row(values: Sequence[str]) -> str:
    line = " & ".join(_escaped(shown(value)) for value in values) + " \\\\"
    return f"{{}}{line}" if line.startswith(("[", "*")) else line  # else an argument of the line break before it


_LATEX = {"\\": "\\textbackslash{}", "&": "\\&", "%": "\\%", "$": "\\$", "#": "\\#", "_": "\\_", "{": "\\{", "}": "\\}",
          "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$", "Δ": "$\\Delta$", "↑": "$\\uparrow$",
          "↓": "$\\downarrow$"}  # fmt: skip


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


FORMATS: dict[str, Callable[[Sequence[Run], Sequence[Absent]], str]] = {
    "md": markdown, "csv": comma_separated, "tex": latex, "json": as_json,
}  # fmt: skip
"""By the ending of a file's name."""
