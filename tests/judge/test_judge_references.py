"""Whose references stand beside an answer: the judge's own by default; recorded, shown, refused where missing."""

import json

import pytest
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.judging import judged, rows

from intactkv_eval.errors import DataError
from intactkv_eval.judge.journal import NAME
from intactkv_eval.mt_bench.sources import PUBLISHED, bench_file, reference_sets
from intactkv_eval.storage.files import read_jsonl


def test_they_follow_the_judges_name_and_are_recorded(server, answer_file, bench, tmp_path):
    out = tmp_path / "out"
    table, said = judged(server, [answer_file], bench, out, model="gpt-4")
    assert "score, 1 to 10 (judge gpt-4, references of gpt-4)" in table
    assert "reference answers: gpt-4 (sha256 " in said
    beside = [prompt for prompt in server.asked if "gpt-4's" in prompt]
    assert len(beside) == 4
    assert not any("judge's" in prompt for prompt in server.asked)
    for kept in (read_jsonl(out / NAME), rows(out, judge="gpt-4")):
        labels = {row["question_id"]: row["references"] for row in kept}
        assert [labels[place] is None for place in range(1, 6)] == [True, False, True, False, True]
        assert labels[2].startswith("gpt-4 (sha256 ")


def test_others_are_named_and_kept_beside(server, answer_file, bench, tmp_path):
    out = tmp_path / "out"
    judged(server, [answer_file], bench, out, model="gpt-4")
    table, _ = judged(server, [answer_file], bench, out, model="gpt-4", references="judge")
    assert "judge gpt-4, references of judge" in table
    assert sum(server.asked.values()) == 14, "the 4 requests with a reference are others"
    assert "gpt-4's" in rows(out, judge="gpt-4")[2]["user_prompt"]
    assert "judge's" in rows(out, judge="gpt-4_references-judge")[2]["user_prompt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "gpt-4o"}, "'gpt-4o' has no reference answers of its own name"), ({"references": "mine"}, "--references mine"),
     ({"model": "../gpt-4"}, "no reference answers"), ({"references": "x/gpt-4"}, "--references x/gpt-4")],
)  # fmt: skip
def test_missing_ones_are_refused_with_those_there_are(server, answer_file, bench, tmp_path, options, message):
    with pytest.raises(DataError, match=message) as error:
        judged(server, [answer_file], bench, tmp_path / "out", **options)
    assert "gpt-4, judge (--references NAME)" in str(error.value)
    assert "reference_answer/" in str(error.value)
    assert not server.asked


def test_a_set_that_lacks_an_answer_is_named(server, answer_file, bench, tmp_path):
    path = bench / "mt_bench" / "reference_answer" / "judge.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(DataError, match=r"judge\.jsonl: no reference answer to turn 1 of question 4 \(coding\)"):
        judged(server, [answer_file], bench, tmp_path / "out")
    assert not server.asked


def test_answers_that_need_none_need_no_file(server, tmp_path):
    bench = write_bench(tmp_path / "data", references=())
    some = lines(tmp_path / "some.jsonl", answers_of("some", (1, 3, 5)))
    table, _ = judged(server, [some], bench, tmp_path / "out")
    assert "(judge judge) |" in table
    with pytest.raises(DataError, match="--references x"):
        judged(server, [some], bench, tmp_path / "out", references="x")


def test_the_published_sets_are_both_named(monkeypatch, tmp_path):
    monkeypatch.delenv("INTACTKV_DATA", raising=False)
    assert reference_sets("mt_bench") == ["gpt-4", "gpt-4-0125-preview"]
    assert reference_sets("vicuna_bench") == ["gpt-4"]
    source = PUBLISHED["mt_bench/reference_answer/gpt-4-0125-preview.jsonl"]
    assert "ruikangliu/IntactKV/e9b841e9357c59ed800620373454110fc52fbfe4/fastchat/data/mt_bench" in source.url
    content = json.dumps({"question_id": 1}).encode()
    monkeypatch.setattr(
        "intactkv_eval.mt_bench.sources.urllib.request.urlopen", lambda url, timeout: _Answer(content, url)
    )
    with pytest.raises(DataError, match="bytes that are not the published ones"):
        bench_file("mt_bench", "reference_answer/gpt-4-0125-preview.jsonl")
    assert _Answer.asked == [source.url]


class _Answer:
    asked: list = []  # noqa: RUF012

    def __init__(self, content, url):
        self.content = content
        self.asked.append(url)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def read(self, most):
        return self.content[:most]


@pytest.mark.shared
def test_the_published_digest_is_that_of_the_file(shared_hub):
    import hashlib

    for name in ("gpt-4", "gpt-4-0125-preview"):
        path = shared_hub.parent / "mt_bench" / "reference_answer" / f"{name}.jsonl"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == PUBLISHED[f"mt_bench/reference_answer/{name}.jsonl"].digest
