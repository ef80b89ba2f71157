"""The grid as values that JSON and CSV can hold: figures, their differences with the tests, the share recovered."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from intactkv_eval.report.compare import Delta
from intactkv_eval.report.family import Verdict
from intactkv_eval.report.grid import Grid, GridEntry, GridRow
from intactkv_eval.report.incomplete import JUDGED
from intactkv_eval.report.pairing import unit_of
from intactkv_eval.sanitize import clean, struck_record

HEAD = ("model", "weights", "kv", "pivot")


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
    settings: dict[int, Any] = {}  # of the scores, which share most of them
    found = []
    for row in grid.rows:
        cell = _storable(_of_row(row)) if row.entries else {}
        for column, entry in row.entries.items():
            score = entry.found.score
            if id(score.settings) not in settings:
                settings[id(score.settings)] = _storable({"settings": score.settings})
            found.append(
                {
                    **cell,
                    **_storable(_figures(grid.titles[column], entry)),
                    "higher_is_better": score.higher_is_better,
                    **settings[id(score.settings)],
                    **_storable({"unpaired": entry.unpaired}),
                    "status": "done",
                }
            )
    return found


def _of_row(row: GridRow) -> dict[str, object]:
    """What all figures of a cell have."""
    return {
        "cell": row.identity.cell.model_dump(mode="json"),
        "hf_arguments": dict(row.identity.hf_arguments),
        "checkpoint": row.identity.checkpoint,
        "formulas": dict(row.identity.formulas),
        "stale": row.identity.stale,
        "pivot_tokens": row.run.pivot_tokens,
        **dict(zip(HEAD, row.labels, strict=True)),
    }


def numbers(title: str, entry: GridEntry) -> dict[str, object]:
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


def _figures(title: str, entry: GridEntry) -> dict[str, object]:
    found, score = entry.found, entry.found.score
    test = found.to_baseline.test if found.to_baseline else None
    return {
        "column": title,
        "task": score.task,
        "metric": score.metric,
        "value": score.value,
        "stderr": score.stderr,
        "spread": score.spread,
        JUDGED: score.settings.get(JUDGED),
        "resampled": unit_of(score),
        **_delta_numbers("delta_base", found.to_baseline, entry.base),
        "delta_base_significant": entry.is_significant,
        "delta_base_test": test.method if test else None,
        "units": test.units if test else None,
        **_delta_numbers("delta_fp", found.to_full_precision, entry.fp),
        **_delta_numbers("delta_plain", found.to_plain, entry.plain),
        **_delta_numbers("delta_bos", found.to_bos, entry.bos),
        **_share_numbers(entry),
    }


def _delta_numbers(name: str, delta: Delta | None, verdict: Verdict | None) -> dict[str, object]:
    """low, high: the simultaneous interval. p: of this difference alone; p_all: of all `tests` of its family."""
    test = delta.test if delta else None
    return {
        name: delta.value if delta else None,
        f"{name}_stderr": delta.stderr if delta else None,
        f"{name}_low": verdict.low if verdict else None,
        f"{name}_high": verdict.high if verdict else None,
        f"{name}_p": test.p if test else None,
        f"{name}_p_all": verdict.p if verdict else None,
        f"{name}_tests": verdict.tests if verdict else None,
    }


def _share_numbers(entry: GridEntry) -> dict[str, object]:
    """An end at infinity is none; `recovered_outside`: the shares up to low and from high on, not those between."""
    share, found = entry.found.share, entry.share
    is_shown = share is not None and found is not None
    return {
        "recovered": share.value if share is not None and is_shown else None,
        "recovered_low": found.low if found else None,
        "recovered_high": found.high if found else None,
        "recovered_outside": found.is_outside if found else None,
    }
