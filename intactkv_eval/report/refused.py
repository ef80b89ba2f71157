"""Why an intact run stands without a baseline: what differs between it and the nearest run that could be one."""

from collections.abc import Mapping, Sequence
from typing import Any

from intactkv_eval.report.collect import Identity, Run
from intactkv_eval.report.compare import baseline_of, comparable, unlike

_SHOWN = 4


def why_unpaired(run: Run, task: str, runs: Sequence[Run]) -> str:
    """Names the differences to the nearest run of the task whose pivot is not intact; says so where there is none."""
    baseline = baseline_of(run.identity)
    wanted = _flat(baseline)
    found: list[list[str]] = []
    for other in runs:
        if other.identity.cell.pivot.intact or task not in other.scores:
            continue
        theirs = _flat(comparable(other.identity, baseline))
        differences = [
            f"{key} ({wanted.get(key)}, {theirs.get(key)})"
            for key in sorted(wanted.keys() | theirs.keys())
            if wanted.get(key) != theirs.get(key)
        ]
        if other.pivot_tokens != run.pivot_tokens:
            differences.append(f"tokens in front ({list(run.pivot_tokens)}, {list(other.pivot_tokens)})")
        found.append(differences + unlike(run.scores[task], other.scores[task]))
    if not found:
        return "no run without an intact pivot on this task (pivot=none, or the same pivot with intact=false)"
    nearest = min(found, key=len)
    more = "" if len(nearest) <= _SHOWN else f" and {len(nearest) - _SHOWN} more"
    return f"no baseline with the same settings; the nearest differs in {', '.join(nearest[:_SHOWN])}{more}"


def _flat(identity: Identity) -> dict[str, Any]:
    """Every setting of an identity under one name."""
    found: dict[str, Any] = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, part in value.items():
                put(f"{name}.{key}" if name else str(key), part)
        else:
            found[name] = value

    put("", identity.cell.model_dump(mode="json"))
    put("hf", dict(identity.hf_arguments))
    put("formula revision", dict(identity.formulas))
    found |= {"weights' hash": identity.source_hash, "checkpoint": identity.checkpoint, "search": identity.awq_search}
    found["symmetric formula"] = identity.symmetric_formula
    return found
