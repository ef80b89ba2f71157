"""Bad servers and bad replies: nothing is lost, nothing invented, and what lacks a verdict is asked anew."""

import hashlib
import json
import logging
import signal
import subprocess
import time
from statistics import mean

import pytest
from helpers.judge_bench import answers_of, lines, write_bench
from helpers.judging import command, judged, rows
from helpers.server import CUT, GOOD, completion, rating_of

from intactkv_eval.commands.judge import judge_command
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.client import JudgeServer
from intactkv_eval.judge.journal import NAME
from intactkv_eval.judge.options import JudgeOptions
from intactkv_eval.judge.verdict import rating_of as rating_of_reply

FAULTS = [
    429, 500, 503, (200, "{"), (200, "<html>"), (200, "[]"), (200, "null"), (200, '{"choices": []}'),
    (200, json.dumps(completion(None))), (200, json.dumps(completion("good, but no number"))),
    (200, json.dumps(completion("Rating: [[11]]"))), (200, json.dumps(completion("[[-3]]"))), CUT, 1.5,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_loses_nothing_and_invents_nothing(server, answer_file, bench, tmp_path, fault):
    server.behave = lambda prompt, before: GOOD if before else fault
    judged(server, [answer_file], bench, tmp_path / "out", timeout=1.0)
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
    whole = f"{mean(means):.2f} (4/5)"
    assert table.count(f"| {whole} | {whole} |") == 1, "over rows, and over whole questions"
    assert table.rstrip().endswith("| 2 |")
    assert "run again to ask anew" in said
    assert "one: 4 of 5 questions are judged whole, 2 verdicts of what was answered are missing" in said
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


def test_a_rerun_of_many_stubborn_replies_still_ends_in_a_table(server, bench, tmp_path):
    many = lines(tmp_path / "many.jsonl", answers_of("many", choices=3))
    server.behave = lambda prompt, before: (200, json.dumps(completion("no number"))) if "|" in prompt else GOOD
    first, _ = judged(server, [many], bench, tmp_path / "out", attempts=1)
    again, said = judged(server, [many], bench, tmp_path / "out", attempts=1)
    assert again == first
    assert "15 replies without a verdict" in said


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("[[7]]", 7), ("Rating: [7]", 7), ("**Rating:** [6.5]", 6.5), ("Score: [7]", 7), ("The rating is [7].", 7),
     ("I would give this answer a [7].", 7), ("Rated 8 of 10: [8]/10", 8), ("Rating:\n\n**[9]**", 9), ("[7]", 7),
     ("Rating: `[5]`", 5), ("The first scores [3]. My rating is [6].", 6), ("[[0]]", 0), ("Rating: [0]", 0),
     ("It reads nums[5] first", None), ("see [1]", None), ("As said in [1].", None), ("I give the list [1] to it", None),
     ("The score nums[5] is read", None), ("The score `x = [5]` is printed", None), ("```\nscore = [3]\n```", None),
     ("Rating: [11]", None), ("Rating: [100]", None), ("[[-3]]", None),
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


@pytest.mark.parametrize("url", ["localhost:8000", "http://host:port/v1", "ftp://host/v1", "http://"])
def test_an_address_that_is_none(answer_file, bench, tmp_path, url):
    with pytest.raises(ConfigError, match="--base-url"):
        judge_command(
            [answer_file], JudgeServer("judge", url), JudgeOptions(questions=bench), tmp_path / "out", logging.info
        )


@pytest.mark.parametrize(
    "url", ["http://user:hunter22@host/v1", "https://hunter22@host", "http://u:hunter22#x@host/v1"]
)
def test_an_address_with_a_password(answer_file, bench, tmp_path, url):
    """It was kept with every reply."""
    with pytest.raises(ConfigError, match=r"holds a user or password, .*OPENAI_API_KEY") as ended:
        judge_command(
            [answer_file], JudgeServer("judge", url), JudgeOptions(questions=bench), tmp_path / "out", logging.info
        )
    assert "hunter22" not in str(ended.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and b"hunter22" in path.read_bytes()]


def test_a_key_in_an_address_is_not_kept(server, answer_file, bench, tmp_path):
    settings = JudgeServer("judge", f"{server.url}?api_key=hunter2222", timeout=5.0, retries=0)
    judge_command([answer_file], settings, JudgeOptions(questions=bench), tmp_path / "out", logging.info)
    kept = (tmp_path / "out" / "replies.jsonl").read_text()
    assert "hunter2222" not in kept
    assert kept.count("struck out") == 10


@pytest.mark.parametrize("usage", [10**400, -1, "many", None])
def test_a_server_that_counts_wrongly_costs_the_estimate(server, answer_file, bench, tmp_path, usage):
    reply = completion("Rating: [[7]]", prompt_tokens=usage)
    reply["choices"][0]["finish_reason"] = "\ud800"
    server.behave = lambda prompt, before: (200, json.dumps(reply))
    judged(server, [answer_file], bench, tmp_path / "out")
    assert [row["score"] for row in rows(tmp_path / "out")] == [7.0] * 10


def test_answers_of_several_models_are_told_apart(server, bench, tmp_path):
    both = lines(tmp_path / "both.jsonl", [*answers_of("one", (1, 2)), *answers_of("two", (3, 4, 5))])
    with pytest.raises(DataError, match=r"answers of 2 models \(one, two\)"):
        judged(server, [both], bench, tmp_path / "out")
    files = [lines(tmp_path / name, answers_of("one")) for name in ("first.jsonl", "second.jsonl")]
    with pytest.raises(DataError, match="have one model_id"):
        judged(server, files, bench, tmp_path / "out")
    with pytest.raises(DataError, match="have one model_id"):
        judged(server, files[:1], bench, tmp_path / "out", baseline=files[1])
    assert not server.asked


@pytest.mark.parametrize("verdict", [float("nan"), -1, 11, 1e300, "A", "x"])
def test_a_journal_holds_no_other_verdict(server, answer_file, bench, tmp_path, verdict):
    judged(server, [answer_file], bench, tmp_path / "out")
    path = tmp_path / "out" / "replies.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    path.write_text(json.dumps({**json.loads(first), "verdict": verdict}) + "\n" + "".join(others))
    with pytest.raises(DataError, match="line 1"):
        judged(server, [answer_file], bench, tmp_path / "out")


def test_judgments_of_elsewhere_are_kept_as_they_are(server, answer_file, bench, tmp_path):
    path = tmp_path / "out" / "model_judgment" / "judge_single.jsonl"
    lines(path, [{"model": ["x"], "score": 1}])
    judged(server, [answer_file], bench, tmp_path / "out")
    assert len(rows(tmp_path / "out")) == 11


def mixed(prompt, before):
    """Two faults for each request, which every kind is among; the third time all is well."""
    faults = [429, 500, 503, (200, "{"), CUT, (200, '{"choices": []}')]
    place = int(hashlib.sha256(prompt.encode()).hexdigest(), 16)
    if before >= 2:
        return GOOD
    return 1.4 if place % 17 == 0 and not before else faults[(place + before * 2) % len(faults)]


def test_160_of_160_through_all_faults_and_a_kill_and_none_twice(server, tmp_path):
    bench = write_bench(tmp_path / "data", 80)
    file = lines(tmp_path / "one.jsonl", answers_of("one", range(1, 81)))
    server.behave, out = mixed, tmp_path / "out"
    arguments = [*command(server, file, bench, out), "--timeout", "1", "--concurrency", "16"]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        until = time.monotonic() + 60
        while sum(server.served.values()) < 40 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert 40 <= sum(server.served.values()) < 160
    kept = {line["user_prompt"] for line in read_jsonl_lines(out / NAME) if line["verdict"] is not None}
    before = dict(server.served)
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = rows(out)
    assert len({(row["question_id"], row["turn"]) for row in found}) == len(found) == 160
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in found)
    assert all(server.served[prompt] == before[prompt] == 1 for prompt in kept), "what was kept is not asked again"
    assert sum(server.served.values()) <= 160 + 16, "no more than was in flight at the kill"


def read_jsonl_lines(path):
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line.endswith(b"}")]
