"""Conversations in all their shapes, and whose each token is."""

import json

import pytest
import torch

from intactkv_eval.calibrate.conversations import Conversations, Message, load_conversations, waits
from intactkv_eval.calibrate.examples import examples_of
from intactkv_eval.errors import ConfigError, DataError

TWO_TURNS = (
    Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four five"),
)  # fmt: skip


def same(tokens):
    return list(tokens)


def test_every_shape_is_read(tmp_path):
    sharegpt = [{"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"},
                                   {"from": "human", "value": "three"}, {"from": "gpt", "value": "four five"}]}]  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(sharegpt))
    lines = [{"messages": [message._asdict() for message in TWO_TURNS]}, {"question_id": 1, "turns": ["one", "three"]}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "t.txt").write_text("some prose")
    assert load_conversations(str(tmp_path / "s.json")).texts == (TWO_TURNS,)
    both = load_conversations(str(tmp_path / "m.jsonl")).texts
    assert both == (TWO_TURNS, (Message("user", "one"), Message("user", "three")))
    assert [waits(one) for one in both] == [False, True]
    assert waits((Message("user", "a"), Message("user", "b"), Message("assistant", "c")))
    plain = ((Message("assistant", "some prose"),),)
    assert load_conversations(str(tmp_path / "t.txt")).texts == plain
    (tmp_path / "t.jsonl").write_text('{"text": "some prose"}')
    assert load_conversations(str(tmp_path / "t.jsonl")).texts == plain
    other = Conversations.of([TWO_TURNS[:2]], "x").digest
    assert load_conversations(str(tmp_path / "s.json")).digest == Conversations.of([TWO_TURNS], "y").digest != other


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", "{", "damaged JSON"),
        ("a.json", "{}", "expected a list"),
        ("a.json", "[]", "holds no conversation"),
        ("a.jsonl", '{"messages": [{"role": "wizard", "content": "x"}]}', "row 1: a message needs a role"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "row 1: a message needs a role"),
        ("a.jsonl", '{"words": "x"}', "row 1: expected messages, conversations, turns or text, found words"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_conversations(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nothing", "absent.json", "file.parquet"])
def test_unknown_sources(source):
    with pytest.raises(ConfigError, match=source):
        load_conversations(source)


def test_the_assistants_tokens_are_counted_and_no_others(tokenizer):
    (example,) = examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, same, least_counted=3)
    mine = tokenizer.decode(example.body[example.counted])
    assert mine == " two\n four five\n"
    whole = tokenizer.decode(example.body)
    assert whole == "<s>Be kind.\nuser: one\nassistant: two\nuser: three\nassistant: four five\n"


def test_the_pivot_is_taken_from_the_front_alone(tokenizer):
    (whole,) = examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, same, least_counted=3)
    (behind,) = examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, lambda ids: ids[10:], least_counted=3)
    assert torch.equal(behind.body, whole.body[10:])
    assert torch.equal(behind.counted, whole.counted[10:])


def test_long_ones_are_cut_and_short_ones_left_out(tokenizer):
    both = Conversations.of([TWO_TURNS, TWO_TURNS[:2]], "x")
    assert len(examples_of(both, tokenizer, same, least_counted=3)) == 2
    assert len(examples_of(both, tokenizer, same, least_counted=6)) == 1
    cut = examples_of(both, tokenizer, same, most_tokens=40, least_counted=3)
    assert [len(one.body) for one in cut] == [40, 35]
    with pytest.raises(DataError, match="more than 50 assistant tokens"):
        examples_of(both, tokenizer, same)


def test_plain_text_counts_whole(tokenizer):
    text = Conversations.of([(Message("assistant", "x" * 100),)], "t.txt")
    found = examples_of(text, tokenizer, same, most_tokens=40, least_counted=5)
    assert [len(one.body) for one in found] == [40, 40, 20]
    assert all(bool(one.counted.all()) for one in found)


def test_templates_that_rewrite_the_beginning_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ messages|length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(DataError, match="otherwise when more follows"):
        examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, same, least_counted=1)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="chat template"):
        examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, same, least_counted=1)
