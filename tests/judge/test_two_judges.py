"""Two `intactkv judge` at one folder at the same time: the second is refused in one message, nothing is paid twice."""

import subprocess
import threading
import time

import pytest
from helpers.judge_bench import answers_of, lines
from helpers.judging import command, rows
from helpers.server import GOOD, rating_of


def begin(*arguments):
    return subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("names", [("one", "one"), ("one", "two")])
def test_one_goes_on_and_one_is_refused(server, bench, tmp_path, names):
    """The server answers nothing until one of them has ended, so that both are there at once."""
    ended = threading.Event()
    server.behave = lambda prompt, before: GOOD if ended.wait(60) else 500
    sources = [lines(tmp_path / f"{name}.jsonl", answers_of(name)) for name in names]
    out = tmp_path / "out"
    both = [begin(server, source, bench, out) for source in sources]
    until = time.monotonic() + 60
    while all(one.poll() is None for one in both) and time.monotonic() < until:
        time.sleep(0.01)
    ended.set()
    said = [one.communicate(timeout=60) for one in both]
    codes = [one.returncode for one in both]
    assert sorted(codes) == [0, 2], said
    refused = codes.index(2)
    assert said[refused][0] == ""
    assert said[refused][1].splitlines()[-1] == (
        f"intactkv: {out / 'replies.jsonl'}: another intactkv judge is writing; wait for it, or name another --out"
    )
    assert "Traceback" not in said[refused][1]
    assert {row["model"] for row in rows(out)} == {names[1 - refused]}
    again = begin(server, sources[refused], bench, out)
    assert again.wait(60) == 0, again.communicate()
    assert {row["model"] for row in rows(out)} == set(names)
    assert len(rows(out)) == 10 * len(set(names))
    assert set(server.asked.values()) == {1}, "something was paid twice"
    assert all(row["score"] == rating_of(row["user_prompt"]) for row in rows(out))
