"""Conversations in all their shapes, and whose each token is."""

import json
from dataclasses import replace

import pytest
import torch

from intactkv_eval.chat.conversations import Conversations, load_conversations
from intactkv_eval.chat.messages import Message, waits
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.training.examples import digest_of_examples, examples_of

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
        ("a.jsonl", '{"messages": [1]}', "row 1: a message needs a role"),
        ("a.json", "[5]", "row 1: expected messages, conversations, turns or text, found int"),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "begins",
        ),
        ("a.jsonl", '{"words": "x"}', "row 1: expected messages, conversations, turns or text, found words"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        load_conversations(str(tmp_path / name))


def turns(*said):
    names = {"h": "human", "g": "gpt", "s": "system", "b": "bing"}
    return {"id": "x", "conversations": [{"from": names[who], "value": text} for who, text in said]}


def test_sharegpts_rows_are_tidied_and_what_is_left_out_is_counted(tmp_path, caplog):
    """As its collectors left them: FastChat's readers skip the same."""
    whole = turns(("h", "one"), ("g", "two"), ("h", "three"), ("g", "four five"))
    rows = [
        whole,
        turns(("g", "hello"), *[("h", "one"), ("g", "two")]),
        turns(("h", "one"), ("g", "two"), ("h", "three")),
        turns(("s", "Be kind."), ("h", "one"), ("g", "two")),
        turns(),
        turns(("h", "one"), ("b", "two")),
        turns(("h", "one"), ("h", "two"), ("g", "three")),
        turns(("g", "hello")),
        turns(("h", "alone")),
        {"conversations": [5, None]},
    ]
    (tmp_path / "s.json").write_text(json.dumps(rows))
    found = load_conversations(str(tmp_path / "s.json")).texts
    assert found == (TWO_TURNS, TWO_TURNS[:2], TWO_TURNS[:2], (Message("system", "Be kind."), *TWO_TURNS[:2]))
    assert "6 of 10 conversations are left out" in caplog.text
    (tmp_path / "s.json").write_text(json.dumps(rows[-2:-1]))
    assert load_conversations(str(tmp_path / "s.json")).texts == ((Message("user", "alone"),),)
    (tmp_path / "s.json").write_text(json.dumps(rows[4:6]))
    with pytest.raises(DataError, match="none of 2 rows"):
        load_conversations(str(tmp_path / "s.json"))


def test_so_many_are_drawn(tokenizer):
    """Of those with enough tokens; by the seed, and questions before they are answered."""
    texts = [(Message("user", str(n)), Message("assistant", "word " * (3 + n))) for n in range(20)]
    all_of_them = Conversations.of(texts, "x")
    assert all_of_them.drawn(None, 3) == all_of_them
    drawn = [all_of_them.drawn(5, seed) for seed in (0, 0, 1)]
    assert drawn[0].digest == drawn[1].digest != drawn[2].digest
    found = examples_of(drawn[0], tokenizer, same, least_counted=60, count=5)
    assert len(found) == 5
    assert all(int(one.counted.sum()) > 60 for one in found)
    with pytest.raises(DataError, match=r"of 20 conversations have more than 60 assistant tokens .* 19 are needed"):
        examples_of(drawn[0], tokenizer, same, least_counted=60, count=19)
    questions = Conversations.of([one[:1] for one in texts], "x").drawn(5, 0)
    assert len(questions.texts) == 5


def test_the_digest_of_examples_is_of_what_counts_too(tokenizer):
    (example,) = examples_of(Conversations.of([TWO_TURNS], "x"), tokenizer, same, least_counted=3)
    other = replace(example, counted=~example.counted)
    assert digest_of_examples([example]) == digest_of_examples([example]) != digest_of_examples([other])


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
