"""The judge over real HTTP: what is asked, what it costs, what the key and pairs are worth."""

import json
import logging
import os
import re
import subprocess
import time
from statistics import mean

import pytest
from helpers.judge_bench import answers_of, lines
from helpers.judging import SECRET, command, judged, rows
from helpers.server import GOOD, completion, honest, rating_of

from intactkv_eval.commands.judge import judge_command
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.client import KEY, JudgeServer
from intactkv_eval.judge.cost import Prices
from intactkv_eval.judge.journal import NAME
from intactkv_eval.judge.options import JudgeOptions


def test_every_answer_is_judged_once_and_scored(server, answer_file, bench, tmp_path):
    table, said = judged(server, [answer_file], bench, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [(row["question_id"], row["turn"]) for row in found] == [(i, turn) for i in range(1, 6) for turn in (1, 2)]
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in found)
    assert {row["judge"][1] for row in found if row["question_id"] in {2, 4}} == {
        "single-math-v1",
        "single-math-v1-multi-turn",
    }
    assert "{model} {0} {{x}}" in found[0]["user_prompt"], "an answer's braces stay"
    assert "judge's 2 0 2" in found[3]["user_prompt"], "the reference's second turn"
    means = [mean(row["score"] for row in found if row["question_id"] == i) for i in range(1, 6)]
    assert f"| {mean(means):.2f} |" in table, "five questions have no error"
    assert "| 0 |" in table
    assert "10 to judge, 0 have their verdict; 10 requests" in said
    assert set(server.asked.values()) == {1}
    before = (tmp_path / "out" / NAME).read_bytes()
    again, said = judged(server, [answer_file], bench, tmp_path / "out")
    assert (again, set(server.asked.values())) == (table, {1})
    assert "10 have their verdict; 0 requests" in said
    assert (tmp_path / "out" / NAME).read_bytes() == before


def test_the_key_is_nowhere(server, answer_file, bench, tmp_path):
    """A server that sends the key back, as an error, as an answer, and then refuses it."""
    echo = (200, json.dumps(completion(f"You sent Bearer {SECRET}. Rating: [[5]]")))
    refusal = (400, json.dumps({"error": {"message": f"bad request by {SECRET}"}}))
    server.behave = lambda prompt, before: refusal if "First 1?" in prompt else echo
    out = tmp_path / "out"
    environment = {**os.environ, KEY: SECRET, "OPENAI_LOG": "debug"}
    runs = [
        subprocess.run(
            command(server, answer_file, bench, out), capture_output=True, text=True, env=environment, check=False
        )
    ]
    assert runs[0].returncode == 3, runs[0].stderr
    assert "bad request by [OPENAI_API_KEY]" in runs[0].stderr
    assert len(rows(out)) == 8
    assert "[OPENAI_API_KEY]" in (out / NAME).read_text()
    server.behave = lambda prompt, before: (401, json.dumps({"error": {"message": f"Incorrect API key {SECRET}"}}))
    runs.append(
        subprocess.run(
            command(server, answer_file, bench, tmp_path / "two"),
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    )
    assert runs[1].returncode == 2
    assert "refuses" in runs[1].stderr
    assert "Traceback" not in runs[1].stderr
    assert server.keys == {f"Bearer {SECRET}"}, "the server did get it"
    for run in runs:
        assert SECRET not in run.stdout + run.stderr
    found = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not found


def test_no_key_and_no_server(answer_file, bench, tmp_path, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ConfigError, match=f"{KEY} is not set"):
        judge_command(
            [answer_file], JudgeServer("judge"), JudgeOptions(questions=bench), tmp_path / "out", logging.info
        )


def test_cost_is_said_and_capped(server, answer_file, bench, tmp_path):
    prices = Prices(10.0, 30.0)
    table, said = judged(server, [answer_file], bench, tmp_path / "out", prices=prices, dry=True)
    assert "10 requests" in said
    assert re.search(r"about [\d,]+ tokens in and 3,000 out, about 0\.\d\d USD", said)
    assert "nothing was asked" in table
    assert not server.asked
    with pytest.raises(ConfigError, match=r"more than the cap of 0\.01 USD"):
        judged(server, [answer_file], bench, tmp_path / "out", prices=prices, cap=0.01)
    with pytest.raises(ConfigError, match="--price-in"):
        judged(server, [answer_file], bench, tmp_path / "out", cap=1.0)
    server.behave = lambda prompt, before: (200, json.dumps(completion(honest(prompt), prompt_tokens=9000)))
    _, said = judged(server, [answer_file], bench, tmp_path / "out", prices=prices, cap=0.25, concurrency=1)
    assert sum(server.asked.values()) == 3, "0.0903 USD each"
    assert "0.27 USD" in said
    assert "7 without a reply" in said
    assert "the cap of 0.25 USD is reached" in said


def test_rate_and_concurrency_are_kept(server, answer_file, bench, tmp_path):
    server.seconds = 0.05
    judged(server, [answer_file], bench, tmp_path / "out", concurrency=3)
    assert 1 < server.most_at_once <= 3
    start = time.monotonic()
    judged(server, [answer_file], bench, tmp_path / "slow", requests_per_minute=600.0)
    assert time.monotonic() - start >= 0.9


def test_pairs_are_judged_in_both_orders(server, answer_file, bench, tmp_path):
    base = lines(tmp_path / "base.jsonl", answers_of("base", range(1, 5)))
    server.reply = lambda prompt: (
        "[[A]]" if prompt.split("Assistant A: ")[1].split("Assistant B")[0].count("base") else "[[B]]"
    )
    table, said = judged(server, [answer_file], bench, tmp_path / "out", baseline=base)
    assert "one: 4 of 5 questions are judged whole" in said
    found = rows(tmp_path / "out", "pair")
    assert len(found) == 8
    assert {(row["g1_winner"], row["g2_winner"]) for row in found} == {("model_2", "model_2")}
    none, half, all_ = (f"{share:.2f} (4/5)" for share in (0, 0.5, 1))
    assert f"| one | 0 | 0 | 8 | {none} | {none} | {none} | {none} | 0 |" in table
    server.reply = lambda prompt: "[[A]]"
    table, _ = judged(server, [answer_file], bench, tmp_path / "biased", baseline=base)
    assert f"| one | 0 | 8 | 0 | {half} | {half} | {half} | {all_} | 0 |" in table
    server.reply = lambda prompt: "[[A]] or rather [[B]]"
    table, _ = judged(server, [answer_file], bench, tmp_path / "torn", baseline=base, attempts=1)
    assert table.rstrip().endswith("| 8 |")
    assert {row["g1_winner"] for row in rows(tmp_path / "torn", "pair")} == {"error"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["choices"][0]["turns"].pop(), "1 answers to 2 turns"),
        (lambda row: row.update(question_id=99), "question 99 is not of this bench"),
        (lambda row: row.update(choices=[]), "line 1: choices"),
    ],
)
def test_answers_that_do_not_fit(server, answer_file, bench, tmp_path, change, message):
    damaged = answers_of("one")
    change(damaged[0])
    lines(answer_file, damaged)
    with pytest.raises(DataError, match=message):
        judged(server, [answer_file], bench, tmp_path / "out")


def test_a_short_stand_in_for_a_key_is_no_secret(server, answer_file, bench, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "1")
    judged(server, [answer_file], bench, tmp_path / "out")
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in rows(tmp_path / "out"))


def test_pairs_that_are_answered_in_part_are_counted(server, answer_file, bench, tmp_path):
    base = lines(tmp_path / "base.jsonl", answers_of("base"))
    server.behave = lambda prompt, before: 400 if "First 1?" not in prompt else GOOD
    server.reply = lambda prompt: "[[A]]"
    table, _ = judged(server, [answer_file], bench, tmp_path / "out", baseline=base, concurrency=1)
    assert table.rstrip().endswith("| 8 |")
    assert len(rows(tmp_path / "out", "pair")) == 10


def test_replies_that_say_nothing_are_paid_for(server, bench, tmp_path):
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=4))
    server.behave = lambda prompt, before: (200, json.dumps(completion(None, prompt_tokens=10**6)))
    _, said = judged(server, [many], bench, tmp_path / "out", prices=Prices(1.0, 1.0), cap=3.0, concurrency=1)
    assert sum(server.asked.values()) == 3
    assert "the cap of 3.00 USD is reached" in said
