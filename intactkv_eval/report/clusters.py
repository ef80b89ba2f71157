"""Which documents of a task belong together: questions on one passage are not independent of each other.

The key is the field that the task's metadata names (`cluster: passage`; `cluster: none` for documents that are
independent), else every long text that several documents share (a passage, a context, an article), and every field that
names such a source (`source_id`). A text that most documents have is an instruction and joins nothing. Knows no models
and no figures.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KEY = "cluster"
_LONG = 40  # letters: shorter texts (`yes`, a subject, a label) are equal by chance
_INSTRUCTION = 0.5  # of the documents
_SOURCES = "article|context|conversation|dialogue|document|paragraph|passage|source|story|text|video"
_SOURCE = re.compile(f"({_SOURCES})_?ids?")


@dataclass(frozen=True)
class Clusters:
    """field: by what documents are joined, empty where each stands alone. of: the cluster of each document."""

    field: str
    of: Mapping[int, str]


def clusters_of(samples: Iterable[Mapping[str, Any]], named: Any = None) -> Clusters:
    """The clusters of logged samples, by `doc_id`. named: the task's metadata `cluster`.

    A sample that carries its own `cluster` (a record whose texts were dropped) keeps it. Raises ValueError where the
    named field is not in a document.
    """
    rows = list(samples)
    places = [row["doc_id"] for row in rows]
    if any(KEY in row for row in rows):
        kept = {place: row[KEY] for place, row in zip(places, rows, strict=True)}
        if not all(isinstance(one, Mapping) and len(one) == 1 for one in kept.values()):
            raise ValueError("the `cluster` of a sample is not one field with its key")
        names = {str(field) for one in kept.values() for field in one}
        return Clusters(", ".join(sorted(names)), {place: str(*one.values()) for place, one in kept.items()})
    docs: list[Mapping[str, Any]] = [doc if isinstance(doc := row.get("doc"), Mapping) else {} for row in rows]
    if named is not None:
        return _by_field(places, docs, str(named))
    fields = _shared_fields(docs)
    if not fields:
        return Clusters("", {})
    return Clusters(", ".join(fields), _joined(places, docs, fields))


def _by_field(places: Sequence[int], docs: Sequence[Mapping[str, Any]], field: str) -> Clusters:
    if field.lower() in {"none", "false"}:
        return Clusters("", {})
    if docs and all(not doc for doc in docs):
        raise ValueError(f"metadata names the cluster {field!r}, but the samples hold no documents")
    missing = next((place for place, doc in zip(places, docs, strict=True) if field not in doc), None)
    if missing is not None:
        raise ValueError(f"metadata names the cluster {field!r}, which document {missing} has not")
    return Clusters(field, {place: _digest(doc[field]) for place, doc in zip(places, docs, strict=True)})


def _shared_fields(docs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields whose long texts, or names of sources, several documents share."""
    shared = []
    for field in sorted({field for doc in docs for field in doc}):
        times = Counter(text for doc in docs if (text := _text(doc, field)))
        if times and 1 < max(times.values()) <= max(1.0, _INSTRUCTION * len(docs)):
            shared.append(str(field))
    return shared


def _joined(places: Sequence[int], docs: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> dict[int, str]:
    """Documents that share the text of any of the fields, directly or through others, are one cluster."""
    parent = list(range(len(docs)))

    def root(one: int) -> int:
        while parent[one] != one:
            parent[one] = parent[parent[one]]
            one = parent[one]
        return one

    first: dict[tuple[str, str], int] = {}
    for number, doc in enumerate(docs):
        for field in fields:
            if text := _text(doc, field):
                parent[root(number)] = root(first.setdefault((field, text), number))
    return {place: f"{places[root(number)]}" for number, place in enumerate(places)}


def _text(doc: Mapping[str, Any], field: str) -> str:
    value = doc.get(field)
    if isinstance(value, str) and len(value) >= _LONG:
        return value
    names_a_source = isinstance(value, str | int) and _SOURCE.fullmatch(field.lower())
    return str(value) if names_a_source else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
