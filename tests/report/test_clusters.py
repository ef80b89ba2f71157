"""Which documents belong together: a named field, a text that several share, and what joins nothing."""

import pytest

from intactkv_eval.report.clusters import clusters_of

PASSAGES = [f"A passage of more than forty letters, the one with number {number}." for number in range(6)]


def samples(docs):
    return [{"doc_id": place, "doc": doc} for place, doc in enumerate(docs)]


def together(found):
    groups = {}
    for place, cluster in found.of.items():
        groups.setdefault(cluster, []).append(place)
    return sorted(groups.values())


def test_questions_on_one_passage_are_found():
    found = clusters_of(
        samples([{"passage": PASSAGES[n // 3], "question": f"q{n}", "label": n % 2} for n in range(12)])
    )
    assert found.field == "passage"
    assert together(found) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]


@pytest.mark.parametrize("field", ["source_id", "passage_id", "articleId", "VideoID"])
def test_a_field_that_names_the_source_joins(field):
    """HellaSwag has two contexts of each video, and names it."""
    found = clusters_of(samples([{field: f"v{n // 2}", "ctx": f"{n}"} for n in range(8)]))
    assert (found.field, together(found)) == (field, [[0, 1], [2, 3], [4, 5], [6, 7]])
    assert clusters_of(samples([{"idx": n // 2, "question_id": n // 2} for n in range(8)])).field == ""


def test_documents_are_joined_through_each_other():
    """A shares its context with B, and B its story with C."""
    docs = [{"context": PASSAGES[0], "story": PASSAGES[1]}, {"context": PASSAGES[0], "story": PASSAGES[2]},
            {"context": PASSAGES[3], "story": PASSAGES[2]}, {"context": PASSAGES[4], "story": PASSAGES[5]},
            {"context": PASSAGES[5], "story": "another of more than forty letters, and that alone"}]  # fmt: skip
    found = clusters_of(samples(docs))
    assert found.field == "context, story"
    assert together(found) == [[0, 1, 2], [3], [4]]


@pytest.mark.parametrize(
    "docs",
    [
        [{"question": f"A question of more than forty letters with its own number {n}"} for n in range(10)],
        [{"subject": "anatomy" if n % 2 else "virology", "text": f"{n}"} for n in range(10)],
        [{"instruction": PASSAGES[0], "text": f"{n}"} for n in range(10)],
        [{"passage": 7, "choices": PASSAGES} for _ in range(10)],
        ["a text alone"] * 10,
        [],
    ],
    ids=["all different", "short", "an instruction", "no texts", "no mapping", "nothing"],
)
def test_what_joins_nothing(docs):
    found = clusters_of(samples(docs))
    assert (found.field, found.of) == ("", {})


def test_the_metadata_names_the_field_or_none():
    docs = [{"talk": n // 2, "passage": PASSAGES[n // 3]} for n in range(6)]
    found = clusters_of(samples(docs), "talk")
    assert (found.field, together(found)) == ("talk", [[0, 1], [2, 3], [4, 5]])
    assert clusters_of(samples(docs), "none").of == {}
    with pytest.raises(ValueError, match="'article', which document 0 has not"):
        clusters_of(samples(docs), "article")
    with pytest.raises(ValueError, match="hold no documents"):
        clusters_of([{"doc_id": 0}], "article")


def test_a_record_without_texts_keeps_its_clusters():
    rows = [{"doc_id": n, "cluster": {"passage": f"{n // 2}"}} for n in range(4)]
    found = clusters_of(rows)
    assert (found.field, together(found)) == ("passage", [[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="not one field"):
        clusters_of([{"doc_id": 0, "cluster": "a"}])
