"""A small bench in FastChat's layout, answers to it, and a server that judges."""

import pytest
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.server import serving


@pytest.fixture
def bench(tmp_path):
    return write_bench(tmp_path / "data")


@pytest.fixture
def answer_file(tmp_path):
    return lines(tmp_path / "answers" / "one.jsonl", answers_of("one"))


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret-0123456789")
    with serving() as made:
        yield made
