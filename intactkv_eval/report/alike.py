"""What makes two scores different measurements. Knows no cells."""

from math import isfinite

from intactkv_eval.report.score import Score


def unlike(one: Score, other: Score) -> list[str]:
    """What makes two scores different measurements, named with both sides; empty where they are the same."""
    found = (
        []
        if one.settings is other.settings
        else [
            f"{key} ({one.settings.get(key)}, {other.settings.get(key)})"
            for key in sorted(one.settings.keys() | other.settings.keys())
            if one.settings.get(key) != other.settings.get(key)
        ]
    )
    if one.metric != other.metric:
        found.append(f"metric ({one.metric}, {other.metric})")
    if one.values and other.values and one.values.keys() != other.values.keys():
        found.append(f"documents with a figure ({len(one.values)}, {len(other.values)}, not the same ones)")
    if one.documents and other.documents and one.documents != other.documents:
        found.append("documents or their prompts (the hashes of their texts differ)")
    if not (one.documents and other.documents) and one.drawn != other.drawn:
        found.append(f"seed of the few-shot examples ({one.drawn}, {other.drawn})")
    if not isfinite(one.value - other.value):
        found.append(f"figures, one of which is no number ({one.value}, {other.value})")
    return found
