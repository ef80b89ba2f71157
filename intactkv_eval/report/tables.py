"""The grid as text: markdown, CSV, LaTeX and JSON. The same runs give the same bytes."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence

from intactkv_eval.report.collect import Run
from intactkv_eval.report.compare import Delta
from intactkv_eval.report.family import Verdict
from intactkv_eval.report.grid import Grid, GridEntry, grid_of
from intactkv_eval.report.notes import MEANING, STALE, testing
from intactkv_eval.report.numbers import HEAD, absent_records, numbers, records
from intactkv_eval.report.planned import Absent
from intactkv_eval.report.published import beside, published_rows
from intactkv_eval.report.score import Score
from intactkv_eval.report.texts import chance, change, figures
from intactkv_eval.sanitize import on_one_line, struck

_MARKUP = re.compile(r"[\\|<*`]|(?<=\])\(")
_FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠")  # the full-width signs too, which spreadsheets take alike
_PLAIN = re.compile(r"[0-9pe .,+±%*\[\]-]*")  # a figure and its differences, in which no credential can be
_PARTS = ("Δ base", "Δ fp", "recovered")


def markdown(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """The table of all runs, what it means, and what was not compared. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    header = [*HEAD, *(name for column in grid.columns for name in (grid.titles[column], *_PARTS))]
    lines = [markdown_row(header), markdown_row(["---"] * len(HEAD) + ["---:"] * (len(header) - len(HEAD)))]
    lines += [markdown_row(row) for row in _texts(grid)]
    refused = [f"- {_marked_down(line)}" for line in grid.refusals]
    tested = [f"- {_marked_down(line)}" for line in testing(grid)]
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
    return "\n".join(
        [*lines, "", MEANING, "", *tested, *_aware(grid), *_longer(grid), *said, *(printed if rows else []), ""]
    )


def _aware(grid: Grid) -> list[str]:
    """Checkpoints that were calibrated behind the pivot against plain ones."""
    said = "Calibrated behind the pivot, against the same calibration without it; both measured behind that pivot:"
    return _pairs(
        grid, said, ("behind the pivot", "plain"), lambda one: (one.found.plain, one.found.to_plain, one.plain)
    )


def _longer(grid: Grid) -> list[str]:
    """Pivots against [BOS] alone."""
    said = "Other pivots against [BOS] alone, both intact; what the tokens themselves do is in the difference:"
    return _pairs(grid, said, ("this pivot", "bos"), lambda one: (one.found.bos, one.found.to_bos, one.bos))


_Pair = tuple[Score | None, Delta | None, Verdict | None]


def _pairs(grid: Grid, said: str, names: tuple[str, str], of: Callable[[GridEntry], _Pair]) -> list[str]:
    """A table of the figures that have a partner of one kind: score, difference, corrected p."""
    rows = []
    for row in grid.rows:
        for column, entry in row.entries.items():
            other, delta, verdict = of(entry)
            if other is not None:
                values = [f"{entry.found.score.value:.4f}", f"{other.value:.4f}", change(delta, verdict)]
                rows.append([*row.labels, grid.titles[column], *values, chance(verdict)])
    if not rows:
        return []
    header = [*HEAD, "measured", *names, "difference", "p (all of them)"]
    rule = markdown_row(["---"] * 5 + ["---:"] * 4)
    return ["", said, "", markdown_row(header), rule, *map(markdown_row, rows)]


def latex(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """A tabular of booktabs, with its legend below. Raises ConfigError where there is no run."""
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
        "\\par\\smallskip",
        "\\parbox{\\linewidth}{\\footnotesize " + _escaped(" ".join(legend(grid))) + "}",
    ]
    return "\n".join([*lines, ""])


def comma_separated(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """One line for each figure, numbers as they are; the last lines have the status `legend` and say what they mean.

    Raises ConfigError where there is no run.
    """
    grid = grid_of(runs, absent)
    made = io.StringIO()
    rows = [{**dict(zip(HEAD, row.labels, strict=True)), **numbers(grid.titles[column], entry), "status": "done"}
            for row in grid.rows for column, entry in row.entries.items()]  # fmt: skip
    writer = csv.DictWriter(made, [*rows[0], "note"], lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(map(_spread_out, rows))
    writer.writerows(_spread_out({key: one[key] for key in (*HEAD, "task", "status")}) for one in absent_records(grid))
    writer.writerows(_spread_out({"status": "legend", "note": line}) for line in legend(grid))
    return made.getvalue()


def legend(grid: Grid) -> list[str]:
    """What the columns mean and what was tested, as plain texts."""
    return [MEANING.replace("\\*", "*").replace("`", "").replace("\n", " "), *testing(grid)]


def _spread_out(row: Mapping[str, object]) -> dict[str, object]:
    """A line that a spreadsheet takes for texts and numbers: one line, and no text that begins as a formula does."""
    texts = {key: shown(value) for key, value in row.items() if isinstance(value, str)}
    return {**row, **{key: f"'{text}" if text.lstrip().startswith(_FORMULA) else text for key, text in texts.items()}}


def as_json(runs: Sequence[Run], absent: Sequence[Absent] = ()) -> str:
    """Every figure with its tests and settings. Raises ConfigError where there is no run."""
    grid = grid_of(runs, absent)
    return json.dumps([*records(grid), *absent_records(grid)], indent=1, ensure_ascii=False) + "\n"


def _texts(grid: Grid) -> list[list[str]]:
    empty = [""] * len(_PARTS)
    rows = []
    for row in grid.rows:
        texts = [figures(row.entries[column]) if column in row.entries else [grid.gap(row, column), *empty]
                 for column in grid.columns]  # fmt: skip
        rows.append([*row.labels, *(text for part in texts for text in part)])
    return rows


def markdown_row(values: Sequence[str]) -> str:
    """One line of a markdown table; names are texts there, whatever they hold."""
    return "| " + " | ".join(map(_marked_down, values)) + " |"


def shown(text: str) -> str:
    """A text of a run on one line, without control characters and credentials."""
    return text if _PLAIN.fullmatch(text) else struck(on_one_line(text))


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
