"""What was answered once is kept: through kills, full disks and re-runs; nothing is asked that is known."""

import os
import resource
import signal
import subprocess
import time

import pytest
from helpers.judge_bench import answers_of, lines
from helpers.judging import command, judged, rows
from helpers.server import rating_of

from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.judge.journal import NAME, Line, opened


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


def test_another_server_is_another_judge(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    server.url = server.url.replace("127.0.0.1", "localhost")
    judged(server, [answer_file], bench, tmp_path / "out")
    assert set(server.asked.values()) == {2}


def test_two_models_judged_one_after_another_stand_in_one_file(server, answer_file, bench, tmp_path):
    judged(server, [answer_file], bench, tmp_path / "out")
    judged(server, [lines(tmp_path / "two.jsonl", answers_of("two"))], bench, tmp_path / "out")
    assert [row["model"] for row in rows(tmp_path / "out")] == ["one"] * 10 + ["two"] * 10


def test_half_a_reply_is_taken_back(tmp_path):
    """A disk that fills up, and a limit on a file's size, take a part of what is written and raise nothing."""
    line = Line(key="a", judge="j", server=None, prompt="p", kind="single", models=("m",), question_id=1, turn=1,
                choice=0, user_prompt="u", reply="r" * 500, finish=None, tokens=None, verdict=7.0, attempt=1, tstamp=0)  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path) as journal:
        journal.add(line)
        size = (tmp_path / NAME).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
        try:
            with pytest.raises(ConfigError, match="a reply cannot be written"):
                journal.add(line.model_copy(update={"key": "b"}))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / NAME).stat().st_size == size
        assert [key.request for key in journal.lines] == ["a"]
        journal.add(line.model_copy(update={"key": "c"}))
    with opened(tmp_path) as journal:
        assert [key.request for key in journal.lines] == ["a", "c"]


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
    monkeypatch.setattr("intactkv_eval.judge.journal.os.fsync", real)
    judged(server, [many], bench, tmp_path / "out")
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in rows(tmp_path / "out"))
