"""The markdown table: cells as rows, for each task its figure, the deltas and the share recovered."""

from collections.abc import Sequence
from pathlib import PurePath

from intactkv_eval.config import CellSpec, KVSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.report.collect import Identity, Run, Score, activations_label
from intactkv_eval.report.compare import Comparison, Delta, compare

NOTES = """\
`pivot` none: the pivot's tokens stand in front but are computed by the evaluated model (the baseline); otherwise their
KV is the full-precision model's. Δ base: to the same cell's baseline. Δ fp: to full precision. ±: one standard error,
of a Δ paired over documents where both runs logged them. recovered: share of the baseline's loss to full precision that
the intact pivot gives back; empty where that loss is within two standard errors."""


def markdown(runs: Sequence[Run]) -> str:
    """The table of all runs: one row a model, one column a task under its settings; of several runs the newest counts.

    Raises ConfigError where there is nothing to show.
    """
    if not runs:
        raise ConfigError("no run of the model class intactkv among the results: evaluate with --model intactkv")
    columns = {score.column: score for run in runs for score in run.scores.values()}
    header = ["model", "weights", "kv", "pivot"]
    for score in columns.values():
        header += [_title(score, list(columns.values())), "Δ base", "Δ fp", "recovered"]
    lines = [_line(header), _line(["---"] * 4 + ["---:"] * (len(header) - 4))]
    for identity, scored in _rows(runs):
        values = _cell_columns(identity)
        for column in columns:
            found = scored.get(column)
            values += _score_columns(compare(found, column[0], runs)) if found else ["", "", "", ""]
        lines.append(_line(values))
    return "\n".join([*lines, "", NOTES, ""])


def weights_label(identity: Identity) -> str:
    """`fp`; method, bits and group (`rtn w4g64`); or how the checkpoint says it is quantized. Then the activations."""
    weights = identity.cell.weights
    stages = [*activations_label(identity.cell.activations), *(["rotated"] if weights.rotate else [])]
    if weights.method == "none":
        return " ".join([identity.checkpoint or "fp", *stages])
    group = "" if weights.group_size in {None, -1} else f"g{weights.group_size}"
    return " ".join([f"{weights.method} w{weights.bits}{group}{' sym' if weights.symmetric else ''}", *stages])


def pivot_label(cell: CellSpec) -> str:
    """`none`, or the source; `(computed)` marks the baseline of a pivot that is not BOS alone."""
    if cell.pivot.intact:
        return PurePath(cell.pivot.source).name
    return "none" if cell.pivot.source == "bos" else f"{PurePath(cell.pivot.source).name} (computed)"


def _rows(runs: Sequence[Run]) -> list[tuple[Identity, dict[tuple[str, str, str], Run]]]:
    """Each model with its newest run of each column; full precision first, then by bits, baseline before intact."""
    found: dict[Identity, dict[tuple[str, str, str], Run]] = {}
    for run in runs:
        found.setdefault(run.identity, {}).update({score.column: run for score in run.scores.values()})

    def place(item: tuple[Identity, object]) -> tuple[object, ...]:
        identity, cell = item[0], item[0].cell
        weights = (not identity.is_full_precision, cell.weights.method, -(cell.weights.bits or 16))
        stages = (-cell.activations.bits, cell.weights.rotate, -cell.kv.bits)
        pivot = (cell.pivot.source != "bos", cell.pivot.source, cell.pivot.intact)
        return cell.model.pretrained, *weights, *stages, *pivot, str(identity)

    return sorted(found.items(), key=place)


def _cell_columns(identity: Identity) -> list[str]:
    cell = identity.cell
    kv = "16" if cell.kv.bits == 16 else _kv_label(cell.kv)
    asked = [f"{key}={value}" for key, value in identity.hf_arguments]
    name = " ".join([PurePath(cell.model.pretrained).name, *asked])
    return [name, weights_label(identity), kv, pivot_label(cell)]


def _kv_label(kv: KVSpec) -> str:
    sizes = f" g{kv.group} recent {kv.recent}" if kv.group is not None else ""
    kept = f" keep {kv.keep}" if kv.keep else ""
    turned = (" rotated" if kv.rotate else "") + (f" clip {kv.clip:g}" if kv.clip < 1 else "")
    return f"{kv.bits} {kv.scheme}{sizes}{kept}{turned}{'' if kv.exempt else ' pivot too'}"


def _title(score: Score, columns: Sequence[Score]) -> str:
    """Task and metric, the protocol, and what sets this column apart from others of the same task."""
    arrow = "↑" if score.higher_is_better else "↓"
    notes = [score.settings["protocol"]]
    if score.settings["limit"]:
        notes.append(f"limit {score.settings['limit']:g}")
    others = [other for other in columns if other.task == score.task and other is not score]
    for key, value in score.settings.items():
        if key not in {"protocol", "limit"} and any(other.settings[key] != value for other in others):
            notes.append(f"{key} {value}")
    named = ", ".join(str(note) for note in notes if note)
    return f"{score.task} {score.metric}{arrow}" + (f" ({named})" if named else "")


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
