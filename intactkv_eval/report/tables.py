"""The markdown table: cells as rows, for each task its figure, the deltas and the share recovered."""

from collections.abc import Sequence
from pathlib import PurePath

from intactkv_eval.config import CellSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import Run, Score
from intactkv_eval.report.compare import Comparison, Delta, compare

NOTES = """\
`pivot` none: the pivot's tokens stand in front but are computed by the evaluated model (the baseline); otherwise their
KV is the full-precision model's. Δ base: to the same cell's baseline. Δ fp: to full precision. ±: one standard error,
of a Δ paired over documents where both runs logged them. recovered: share of the baseline's loss to full precision that
the intact pivot gives back; empty where that loss is within two standard errors."""


def markdown(runs: Sequence[Run]) -> str:
    """The table of all runs: one row a cell; of several runs of one cell and task the newest counts.

    Raises ConfigError where there is nothing to show.
    """
    if not runs:
        raise ConfigError("no run of the model class intactkv among the results: evaluate with --model intactkv")
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores))
    rows = _rows(runs)
    header = ["model", "weights", "kv", "pivot"]
    for task in tasks:
        header += [_task_title(task, runs), "Δ base", "Δ fp", "recovered"]
    lines = [_line(header), _line(["---"] * 4 + ["---:"] * (len(header) - 4))]
    for cell, scored in rows:
        values = _cell_columns(cell)
        for task in tasks:
            values += _score_columns(compare(scored[task], task, runs)) if task in scored else ["", "", "", ""]
        lines.append(_line(values))
    return "\n".join([*lines, "", NOTES, ""])


def weights_label(cell: CellSpec) -> str:
    """`fp`, or method, bits and group: `rtn w4g64`."""
    weights = cell.weights
    if weights.method == "none":
        return "fp"
    group = "" if weights.group_size in {None, -1} else f"g{weights.group_size}"
    return f"{weights.method} w{weights.bits}{group}{' sym' if weights.symmetric else ''}"


def pivot_label(cell: CellSpec) -> str:
    """`none`, or the source; `(computed)` marks the baseline of a pivot that is not BOS alone."""
    if cell.pivot.intact:
        return PurePath(cell.pivot.source).name
    return "none" if cell.pivot.source == "bos" else f"{PurePath(cell.pivot.source).name} (computed)"


def _rows(runs: Sequence[Run]) -> list[tuple[CellSpec, dict[str, Run]]]:
    """Each cell with, for each task, its newest run; full precision first, then by bits, baseline before intact."""
    found: dict[CellSpec, dict[str, Run]] = {}
    for run in runs:
        found.setdefault(run.cell, {}).update(dict.fromkeys(run.scores, run))

    def place(item: tuple[CellSpec, dict[str, Run]]) -> tuple[object, ...]:
        cell = item[0]
        quantized = cell.weights.method != "none"
        order = (quantized, cell.weights.method, -(cell.weights.bits or 16), -cell.kv.bits)
        pivot = (cell.pivot.source != "bos", cell.pivot.source, cell.pivot.intact)
        return cell.model.pretrained, *order, *pivot, str(cell)

    return sorted(found.items(), key=place)


def _cell_columns(cell: CellSpec) -> list[str]:
    kept = f" keep {cell.kv.keep}" if cell.kv.keep else ""
    kv = "16" if cell.kv.bits == 16 else f"{cell.kv.bits} {cell.kv.scheme}{kept}"
    return [PurePath(cell.model.pretrained).name, weights_label(cell), kv, pivot_label(cell)]


def _task_title(task: str, runs: Sequence[Run]) -> str:
    score: Score = next(run.scores[task] for run in reversed(runs) if task in run.scores)
    arrow = "↑" if score.higher_is_better else "↓"
    notes = [score.protocol, f"limit {score.settings['limit']:g}" if score.settings["limit"] else None]
    named = [note for note in notes if note]
    return f"{task} {score.metric}{arrow}" + (f" ({', '.join(named)})" if named else "")


def _score_columns(found: Comparison) -> list[str]:
    value = f"{found.score.value:.4f}" + (f" ± {found.score.stderr:.4f}" if found.score.stderr is not None else "")
    recovered = "" if found.recovered is None else f"{100 * found.recovered:.0f}%"
    return [value, _delta(found.to_baseline), _delta(found.to_full_precision), recovered]


def _delta(delta: Delta | None) -> str:
    if delta is None:
        return ""
    return f"{delta.value:+.4f}" + (f" ± {delta.stderr:.4f}" if delta.stderr is not None else "")


def _line(values: Sequence[str]) -> str:
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"
