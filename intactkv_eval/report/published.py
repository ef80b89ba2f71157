"""Published figures, as data, beside our own of the same cell: the difference, and whether the protocol is the same.

    results/published/figures.csv: source, task, metric, protocol, model, method, bits, group_size, act_bits, kv_bits,
                                   pivot, value (accuracies in percent)

A model is known by the words of its name (`Vicuna-v1.5-7B` is `lmsys/vicuna-7b-v1.5`), never by a part of them.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite
from pathlib import PurePath

from intactkv_eval.report.collect import Identity
from intactkv_eval.report.grid import Grid, GridEntry
from intactkv_eval.storage.files import shipped_folder

_NO_WORDS = {"hf", "meta"}
_KEY = ("method", "bits", "group_size", "act_bits", "kv_bits", "pivot")
_DOCUMENTS = {"ppl_c4": 256, "mt_bench": 80}
_SHOTS = {"mmlu_5shot": 5}  # others have none
_QUAROT_KV_CLIP, _QUAROT_ACTIVATIONS = 0.95, "a4 clip 0.9"  # of table 5, by the paper's appendix
_LABEL = re.compile(r"(?P<method>\w+) w(?P<bits>\d)(g(?P<group>\d+))?")
_ACTIVATIONS = re.compile(r" a(\d)\b")


@dataclass(frozen=True)
class Published:
    """One printed figure. key: model, method, bits, group, activation and KV bits, pivot."""

    source: str
    task: str
    metric: str
    protocol: str
    key: tuple[object, ...]
    value: float


@dataclass(frozen=True)
class Beside:
    """Ours and theirs, in their unit. protocol: what differs of it, empty where it is the same."""

    labels: tuple[str, ...]
    title: str
    ours: float
    stderr: float | None
    published: Published
    protocol: str

    @property
    def difference(self) -> float:
        """Ours - theirs."""
        return self.ours - self.published.value


@lru_cache(maxsize=1)
def figures() -> tuple[Published, ...]:
    """All of them."""
    with (shipped_folder("results/published") / "figures.csv").open(encoding="utf-8", newline="") as file:
        return tuple(
            Published(
                source=row["source"],
                task=row["task"],
                metric=row["metric"],
                protocol=row["protocol"],
                key=(_words(row["model"]), *(row[part] for part in _KEY)),
                value=float(row["value"]),
            )
            for row in csv.DictReader(file)
        )


def beside(grid: Grid) -> list[Beside]:
    """Every figure of the grid that was published for its cell and task, under whatever protocol."""
    found = []
    for row in grid.rows:
        key = _key(row.identity)
        for column, entry in row.entries.items():
            printed = (_as_printed(key, column[0]), column[0], column[1])
            for one in _by_place().get(printed, ()) if isfinite(entry.found.score.value) else ():
                scale = 100 if one.metric == "acc" else 1
                error = entry.found.score.stderr
                found.append(
                    Beside(
                        row.labels, grid.titles[column], entry.found.score.value * scale,
                        None if error is None else error * scale, one, _differs(entry, one),
                    )
                )  # fmt: skip
    return found


@lru_cache(maxsize=1)
def _by_place() -> dict[tuple[object, ...], list[Published]]:
    """The figures of each cell, task and metric."""
    found: dict[tuple[object, ...], list[Published]] = defaultdict(list)
    for one in figures():
        found[one.key, one.task, one.metric].append(one)
    return dict(found)


def _as_printed(key: tuple[object, ...], task: str) -> tuple[object, ...]:
    """MT-Bench's prompts begin with the prompt's head: computed, it is the plain model."""
    return (*key[:-1], "none") if task == "mt_bench" and key[-1] == "prompt (computed)" else key


def _differs(entry: GridEntry, one: Published) -> str:
    settings = entry.found.score.settings
    said = _unlike_theirs(entry.run.identity, one)
    wanted, made = _DOCUMENTS.get(one.task), settings.get("documents")
    if wanted and made and made != wanted:
        said.append(f"ours: {made} documents of {wanted}")
    if (settings.get("protocol") or "") != one.protocol:
        said.append(f"theirs: {one.protocol}")
    if settings.get("limit"):
        said.append(f"ours: limit {settings['limit']:g}")
    shots = settings.get("num_fewshot")
    if shots is not None and shots != _SHOTS.get(one.task, 0):
        said.append(f"ours: {shots} shots")
    # MT-Bench's conversations are laid out by the task, as FastChat's are.
    prompts = [] if one.task == "mt_bench" else ["chat_template", "system_instruction"]
    said += [f"ours: {key.replace('_', ' ')}" for key in prompts if settings.get(key)]
    return "; ".join(said)


def _unlike_theirs(identity: Identity, one: Published) -> list[str]:
    """Settings that no printed figure has, or that its own method does not."""
    cell, said = identity.cell, []
    if cell.weights.symmetric or " sym" in (identity.checkpoint or ""):
        said += ["ours: symmetric"] if one.key[1] in {"rtn", "gptq", "awq"} else []
    if one.key[1] == "omniquant" and one.key[4]:
        said.append("ours: OmniQuant without shifts")
    if "calibrated behind" in (identity.checkpoint or ""):
        said.append("ours: calibrated behind the pivot")
    rotated = one.key[1] == "quarot"
    if cell.kv.bits < 16 and (
        (cell.kv.scheme, cell.kv.sink_tokens, cell.kv.quantize_pivot) != ("token_head", 0, False)
        or (cell.kv.rotate, cell.kv.clip) != (rotated, _QUAROT_KV_CLIP if rotated else 1.0)
    ):
        said.append("ours: another KV scheme")
    if rotated and _QUAROT_ACTIVATIONS not in (identity.checkpoint or ""):
        said.append("ours: other clipping of activations")
    if rotated and " sym-quarot" not in (identity.checkpoint or ""):
        said.append("ours: scales of weights not by QuaRot's symmetric formula")
    said += [f"ours: {key}={value}" for key, value in identity.hf_arguments]
    return said


def _key(identity: Identity) -> tuple[object, ...]:
    cell = identity.cell
    weights, kv = cell.weights, "" if cell.kv.bits == 16 else str(cell.kv.bits)
    method: str = weights.method
    bits, group = str(weights.bits or ""), str(weights.group_size or "")
    activations = "" if cell.activations.bits == 16 else str(cell.activations.bits)
    if cell.weights.rotate:
        method += " rotated"
    if method == "none":
        method, bits, group = "fp", "", ""
    label = _LABEL.match(identity.checkpoint or "")
    if label:
        method, bits, group = label["method"], label["bits"], label["group"] or ""
        inside = _ACTIVATIONS.search(identity.checkpoint or "")
        activations = inside[1] if inside else activations
        method = "quarot" if " rotated" in (identity.checkpoint or "") else method
    name = cell.model.reference or cell.model.pretrained
    return _words(PurePath(name).name), method, bits, "" if group == "-1" else group, activations, kv, _pivot(identity)


def _pivot(identity: Identity) -> str:
    pivot = identity.cell.pivot
    if not pivot.intact:
        return "none" if pivot.source == "bos" else f"{pivot.source} (computed)"
    return "calibrated" if pivot.kind == "kv_file" else pivot.source


def _words(name: str) -> frozenset[str]:
    return frozenset(name.lower().split("-")) - _NO_WORDS


def published_rows(found: Sequence[Beside]) -> list[list[str]]:
    """A table of them with its head; nothing where there are none."""
    if not found:
        return []
    rows = [["model", "weights", "kv", "pivot", "measured", "ours", "published", "difference", "protocol", "source"]]
    for one in found:
        error = f" ± {one.stderr:.2f}" if one.stderr is not None else ""
        values = [f"{one.ours:.2f}{error}", f"{one.published.value:g}", f"{one.difference:+.2f}"]
        rows.append([*one.labels, one.title, *values, one.protocol or "the same", one.published.source])
    return rows
