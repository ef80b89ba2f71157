"""Judges that want another request: reasoning models behind OpenAI's API, and Anthropic's messages."""

import json

import pytest
from helpers.judge_bench import answers_of, lines
from helpers.judging import judged, rows
from helpers.server import GOOD, honest, rating_of

from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.client import ANTHROPIC_KEY, KEY, Judge, JudgeServer
from intactkv_eval.judge.journal import NAME
from intactkv_eval.judge.wire import Spelling, anthropic_base, speaks_anthropic
from intactkv_eval.storage.files import read_jsonl

SECRET = "sk-ant-very-secret-0123456789"
NO_LIMIT = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
NO_TEMPERATURE = (
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported."
)


def refused(message):
    return 400, json.dumps({"error": {"message": message, "type": "invalid_request_error"}})


def reasoning(body):
    """A server of a model that refuses `max_tokens` and `temperature`, one after the other."""
    if "max_tokens" in body:
        return refused(NO_LIMIT)
    return refused(NO_TEMPERATURE) if "temperature" in body else GOOD


def test_a_reasoning_model_gets_the_request_that_it_wants(server, answer_file, bench, tmp_path):
    server.behave = lambda prompt, before: reasoning
    _, said = judged(server, [answer_file], bench, tmp_path / "out", concurrency=1)
    assert [row["score"] for row in rows(tmp_path / "out")] == [rating_of(p) for p in served_in_order(tmp_path)]
    accepted = [body for body in server.bodies if "temperature" not in body]
    assert all(body["max_completion_tokens"] == 2048 and "max_tokens" not in body for body in accepted)
    assert len(server.bodies) == 10 + 2, "what it refuses is found out once"
    assert set(server.served.values()) == {1}
    assert "judge takes no temperature: it was asked at its own" in said
    assert {line["temperature"] for line in read_jsonl(tmp_path / "out" / NAME)} == {None}


def served_in_order(tmp_path):
    return [row["user_prompt"] for row in rows(tmp_path / "out")]


@pytest.mark.parametrize(
    "message", ["the prompt is about temperature", "invalid temperature in messages[1]", "context length exceeded"]
)
def test_another_complaint_changes_no_request(server, answer_file, bench, tmp_path, message):
    server.behave = lambda prompt, before: refused(message) if "First 1?" in prompt else GOOD
    judged(server, [answer_file], bench, tmp_path / "out")
    assert all(body["temperature"] == 0 for body in server.bodies)
    assert set(server.asked.values()) == {1}


def anthropic(body):
    """What Anthropic's API replies to a request in its own form."""
    assert set(body) == {"model", "system", "messages", "max_tokens", "temperature"}
    assert [message["role"] for message in body["messages"]] == ["user"]
    text = honest(body["messages"][0]["content"])
    content = [
        {"type": "thinking", "thinking": "[[1]]"},
        {"type": "text", "text": text[:4]},
        {"type": "text", "text": text[4:]},
    ]
    usage = {"input_tokens": 100, "output_tokens": 10}
    return 200, json.dumps({"type": "message", "content": content, "stop_reason": "end_turn", "usage": usage})


def test_anthropics_messages(server, answer_file, bench, tmp_path, monkeypatch):
    monkeypatch.setenv(ANTHROPIC_KEY, SECRET)
    server.behave = lambda prompt, before: anthropic if before else 529  # overloaded, at first
    server.url += "/messages"
    _, said = judged(server, [answer_file], bench, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["score"] for row in found] == [rating_of(row["user_prompt"]) for row in found]
    assert len(found) == 10
    assert set(server.paths) == {("/v1/messages", SECRET)}
    assert server.keys == {None}, "no key of OpenAI's goes to another server"
    assert server.bodies[0]["system"] == "Be fair."
    assert "1,000 tokens in, 100 out" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_anthropics_key_is_struck_out(server, answer_file, bench, tmp_path, monkeypatch):
    monkeypatch.setenv(ANTHROPIC_KEY, SECRET)
    server.behave = lambda prompt, before: (401, json.dumps({"error": {"message": f"invalid x-api-key {SECRET}"}}))
    server.url += "/messages"
    with pytest.raises(ConfigError, match=r"refuses: .*\[ANTHROPIC_API_KEY\]"):
        judged(server, [answer_file], bench, tmp_path / "out")


@pytest.mark.parametrize("data", [{}, {"content": None}, {"content": [{"type": "text"}]}, [], "x", None])
def test_half_of_anthropics_reply_is_none(data):
    assert Spelling(is_anthropic=True).read(data) is None


def test_which_addresses_are_anthropics(monkeypatch):
    monkeypatch.setenv(ANTHROPIC_KEY, SECRET)
    monkeypatch.setenv(KEY, "sk-other-0123456789")
    for url, wanted in {
        "https://api.anthropic.com": "https://api.anthropic.com/v1/",
        "https://api.anthropic.com/v1/": "https://api.anthropic.com/v1/",
        "https://api.anthropic.com/v1/messages": "https://api.anthropic.com/v1/",
        "http://localhost:8080/v1/messages": "http://localhost:8080/v1/",
        "http://localhost:8080/proxy/v1/messages/": "http://localhost:8080/proxy/v1/",
    }.items():
        assert speaks_anthropic(url)
        assert str(Judge(JudgeServer("claude", url))._client.base_url) == wanted
    for url in (None, "https://api.openai.com/v1", "http://localhost/messages/v1", "https://notanthropic.com/v1"):
        assert not speaks_anthropic(url)
    assert anthropic_base("http://host/messages") == "http://host/v1"


def test_every_two_models_are_judged(server, bench, tmp_path):
    files = [lines(tmp_path / f"{name}.jsonl", answers_of(name)) for name in ("a", "b", "c")]
    server.reply = lambda prompt: (
        "[[A]]" if " of a " in prompt.split("Assistant A: ")[1].split("Assistant B")[0] else "[[B]]"
    )
    table, said = judged(server, files, bench, tmp_path / "out", all_pairs=True)
    found = rows(tmp_path / "out", "pair")
    assert {(row["model_1"], row["model_2"]) for row in found} == {("a", "b"), ("a", "c"), ("b", "c")}
    assert len(found) == 30
    named = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines()[2:]
    }
    assert named == {"a": ["20", "0", "0"], "b": ["0", "10", "10"], "c": ["0", "10", "10"]}
    assert "pairs against each other (judge judge, references of judge)" in table
    assert "incomplete" not in said
    with pytest.raises(ConfigError, match="--pairwise-all: needs two models"):
        judged(server, files[:1], bench, tmp_path / "out", all_pairs=True)
    with pytest.raises(ConfigError, match="with --baseline"):
        judged(server, files[:2], bench, tmp_path / "out", all_pairs=True, baseline=files[2])
