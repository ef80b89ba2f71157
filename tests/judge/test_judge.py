"""The judge over real HTTP: what comes is kept, what does not is asked again, nothing is invented."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from statistics import mean, stdev

import pytest
from conftest import answers_of, lines
from server import GOOD, completion, honest, rating_of

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.files import read_jsonl
from intactkv_eval.judge.client import KEY, Settings
from intactkv_eval.judge.command import Asked, judge_command
from intactkv_eval.judge.cost import Prices
from intactkv_eval.judge.journal import NAME
from intactkv_eval.judge.verdict import rating_of as rating_of_reply

SECRET = "sk-very-secret-0123456789"


def judged(server, sources, bench, out, says=None, **options):
    settings = {"seconds": 5.0, "retries": 4} | {
        key: options.pop(key) for key in ("seconds", "retries", "rate") if key in options
    }
    said = []
    table = judge_command(
        sources, Settings("judge", server.url, **settings), Asked(questions=bench, **options), out, said.append
    )
    return table, "\n".join(said)


def rows(out, kind="single"):
    return read_jsonl(out / "model_judgment" / f"judge_{kind}.jsonl")


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
    assert "gpt-4 2 0 2" in found[3]["user_prompt"], "the reference's second turn"
    means = [mean(row["score"] for row in found if row["question_id"] == i) for i in range(1, 6)]
    assert f"{mean(means):.2f} ± {stdev(means) / 5**0.5:.2f}" in table
    assert "| 0 |" in table
    assert "10 to judge, 0 have their verdict; 10 requests" in said
    assert set(server.asked.values()) == {1}
    before = (tmp_path / "out" / NAME).read_bytes()
    again, said = judged(server, [answer_file], bench, tmp_path / "out")
    assert (again, set(server.asked.values())) == (table, {1})
    assert "10 have their verdict; 0 requests" in said
    assert (tmp_path / "out" / NAME).read_bytes() == before


FAULTS = [
    429, 500, 503, (200, "{"), (200, "<html>"), (200, "[]"), (200, "null"), (200, '{"choices": []}'),
    (200, json.dumps(completion(None))), (200, json.dumps(completion("good, but no number"))),
    (200, json.dumps(completion("Rating: [[11]]"))), (200, json.dumps(completion("Rating: [[0]]"))),
    (200, json.dumps(completion("[[-3]]"))), 1.5,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_loses_nothing_and_invents_nothing(server, answer_file, bench, tmp_path, fault):
    server.behave = lambda prompt, before: GOOD if before else fault
    judged(server, [answer_file], bench, tmp_path / "out", seconds=1.0)
    found = rows(tmp_path / "out")
    assert len(found) == 10
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in found)


@pytest.mark.parametrize("fault", FAULTS[:-1], ids=str)
def test_what_stays_without_a_verdict_is_no_zero_and_is_asked_anew(server, answer_file, bench, tmp_path, fault):
    stubborn = "First 3?"
    server.behave = lambda prompt, before: fault if stubborn in prompt else GOOD
    table, said = judged(server, [answer_file], bench, tmp_path / "out", retries=1, attempts=2)
    kept = [row for row in rows(tmp_path / "out") if row["score"] != -1]
    assert len(kept) == 8
    means = [mean(row["score"] for row in kept if row["question_id"] == i) for i in (1, 2, 4, 5)]
    assert f"{mean(means):.2f} ± {stdev(means) / 2:.2f}" in table
    assert table.rstrip().endswith("| 2 |")
    assert "run again to ask anew" in said
    server.behave = lambda prompt, before: GOOD
    server.asked.clear()
    table, _ = judged(server, [answer_file], bench, tmp_path / "out")
    assert len(server.asked) == 2
    assert all(stubborn in prompt for prompt in server.asked)
    assert table.rstrip().endswith("| 0 |")


def test_a_server_that_never_answers_ends_the_run(server, bench, tmp_path):
    server.behave = lambda prompt, before: 500
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=20))
    with pytest.raises(ConfigError, match=r"gives no reply.*status 500"):
        judged(server, [many], bench, tmp_path / "out", retries=0)
    assert len(server.asked) < 40


def test_a_changed_answer_is_judged_anew(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    changed = answers_of("one")
    changed[0]["choices"][0]["turns"][1] = "Another second answer."
    lines(answer_file, changed)
    server.asked.clear()
    judged(server, [answer_file], bench, tmp_path / "out")
    assert len(server.asked) == 1
    assert "Another second answer." in next(iter(server.asked))


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_line_that_a_kill_has_cut_is_asked_again(server, answer_file, bench, tmp_path, cut):
    out = tmp_path / "out"
    table, _ = judged(server, [answer_file], bench, out)
    path = out / NAME
    path.write_bytes(path.read_bytes()[:-cut])
    server.asked.clear()
    assert judged(server, [answer_file], bench, out)[0] == table
    assert len(server.asked) == 1
    assert len(path.read_text().splitlines()) == 10


def test_a_damaged_journal_is_named(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    path = tmp_path / "out" / NAME
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(DataError, match=r"replies\.jsonl, line 1"):
        judged(server, [answer_file], bench, tmp_path / "out")


def command(server, answer_file, bench, out, *more):
    return [sys.executable, "-m", "intactkv_eval.cli", "judge", str(answer_file), "--model", "judge", "--out", str(out),
            "--base-url", server.url, "--questions", str(bench), *more]  # fmt: skip


def test_killed_at_any_moment_it_asks_only_what_is_missing(server, bench, tmp_path):
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=6))
    server.seconds = 0.05
    out, kills = tmp_path / "out", 0
    for wait in (0, 5, 17):
        process = subprocess.Popen(command(server, many, bench, out, "--concurrency", "2"), stderr=subprocess.PIPE)
        until = time.monotonic() + 60
        goal = sum(server.asked.values()) + wait
        while sum(server.asked.values()) < goal and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 3
    whole = subprocess.run(
        command(server, many, bench, out, "--concurrency", "2"), capture_output=True, text=True, check=True
    )
    assert len(rows(out)) == 60
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in rows(out))
    assert sum(server.asked.values()) <= 60 + 2 * kills, "more than what was under way was asked again"
    undisturbed = subprocess.run(
        command(server, many, bench, tmp_path / "other"), capture_output=True, text=True, check=True
    )
    assert whole.stdout == undisturbed.stdout


def test_the_key_is_nowhere(server, answer_file, bench, tmp_path):
    """A server that sends the key back, as an error, as an answer, and then refuses it."""
    echo = (200, json.dumps(completion(f"You sent Bearer {SECRET}. Rating: [[5]]")))
    refusal = (400, json.dumps({"error": {"message": f"bad request by {SECRET}"}}))
    server.behave = lambda prompt, before: refusal if not before else echo
    out = tmp_path / "out"
    environment = {**os.environ, KEY: SECRET, "OPENAI_LOG": "debug"}
    runs = [
        subprocess.run(
            command(server, answer_file, bench, out), capture_output=True, text=True, env=environment, check=False
        )
    ]
    assert runs[0].returncode == 0, runs[0].stderr
    assert len(rows(out)) == 10
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
        judge_command([answer_file], Settings("judge"), Asked(questions=bench), tmp_path / "out", logging.info)


def test_cost_is_said_and_capped(server, answer_file, bench, tmp_path):
    prices = Prices(10.0, 30.0)
    table, said = judged(server, [answer_file], bench, tmp_path / "out", prices=prices, dry=True)
    assert "about 3,000 out" in said or "3,000 out, about 0." in said
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
    judged(server, [answer_file], bench, tmp_path / "slow", rate=600.0)
    assert time.monotonic() - start >= 0.9


def test_pairs_are_judged_in_both_orders(server, answer_file, bench, tmp_path):
    base = lines(tmp_path / "base.jsonl", answers_of("base", range(1, 5)))
    server.reply = lambda prompt: (
        "[[A]]" if prompt.split("Assistant A: ")[1].split("Assistant B")[0].count("base") else "[[B]]"
    )
    table, _ = judged(server, [answer_file], bench, tmp_path / "out", baseline=base)
    found = rows(tmp_path / "out", "pair")
    assert len(found) == 8
    assert {(row["g1_winner"], row["g2_winner"]) for row in found} == {("model_2", "model_2")}
    assert "| one | 0.00 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | 0.00 ± 0.00 | 0 |" in table
    server.reply = lambda prompt: "[[A]]"
    table, _ = judged(server, [answer_file], bench, tmp_path / "biased", baseline=base)
    assert "| one | 0.50 ± 0.00 | 0.50 ± 0.00 | 0.50 ± 0.00 | 1.00 ± 0.00 | 0 |" in table
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


def test_a_rerun_of_many_stubborn_replies_still_ends_in_a_table(server, bench, tmp_path):
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=3))
    server.behave = lambda prompt, before: (200, json.dumps(completion("no number"))) if "|" in prompt else GOOD
    first, _ = judged(server, [many], bench, tmp_path / "out", attempts=1)
    again, said = judged(server, [many], bench, tmp_path / "out", attempts=1)
    assert again == first
    assert "15 replies without a verdict" in said


def test_another_server_is_another_judge(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    server.url = server.url.replace("127.0.0.1", "localhost")
    judged(server, [answer_file], bench, tmp_path / "out")
    assert set(server.asked.values()) == {2}


def test_two_models_judged_one_after_another_stand_in_one_file(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    judged(server, [lines(tmp_path / "two.jsonl", answers_of("two"))], bench, tmp_path / "out")
    assert [row["model"] for row in rows(tmp_path / "out")] == ["one"] * 10 + ["two"] * 10


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("[[7]]", 7), ("Rating: [7]", 7), ("**Rating:** [6.5]", 6.5), ("It reads nums[5] first", None), ("see [1]", None),
     ("[[11]] [[5]]", None), ("[[10]]", 10), ("[[]]", None), ("", None)],
)  # fmt: skip
def test_ratings_are_read_and_not_made_up(reply, rating):
    assert rating_of_reply(reply) == rating


@pytest.mark.parametrize("text", ["a half \ud83d Rating: [[7]]", "two\u2028lines\u0085 Rating: [[7]]"])
def test_strange_letters_are_kept(server, bench, tmp_path, text):
    body = json.dumps(completion(text))
    server.behave = lambda prompt, before: (200, body)
    strange = answers_of("strange")
    strange[0]["choices"][0]["turns"][0] = "one\u2028two\u0085three"
    file = tmp_path / "strange.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in strange), encoding="utf-8")
    for _ in range(2):
        judged(server, [file], bench, tmp_path / "out")
    assert {row["score"] for row in rows(tmp_path / "out")} == {7}
    assert sum(server.asked.values()) == 10


def test_a_disk_that_is_full_ends_the_run_at_once(server, bench, tmp_path, monkeypatch):
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=4))
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("intactkv_eval.judge.journal.os.fsync", full)
    server.seconds = 0.02
    with pytest.raises(ConfigError, match="a reply cannot be written"):
        judged(server, [many], bench, tmp_path / "out", concurrency=2)
    assert sum(server.asked.values()) < 12


@pytest.mark.parametrize("url", ["localhost:8000", "http://host:port/v1", "ftp://host/v1", "http://"])
def test_an_address_that_is_none(answer_file, bench, tmp_path, url):
    with pytest.raises(ConfigError, match="--base-url"):
        judge_command([answer_file], Settings("judge", url), Asked(questions=bench), tmp_path / "out", logging.info)


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
