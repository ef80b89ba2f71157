"""Two commands at the same folder, file or output at once: nothing is lost, nothing mixed, at most one message."""

import json
import os
import threading

import pytest
from helpers import forked
from sqlitedict import SqliteDict

from intactkv_eval.bench.report import write_results
from intactkv_eval.commands.calibrate import writing_alone
from intactkv_eval.errors import ConfigError
from intactkv_eval.judge.journal import opened
from intactkv_eval.lm.evaluate_task import check_written, results_below
from intactkv_eval.lm.response_cache import guard_response_cache
from intactkv_eval.report.collect import collect
from intactkv_eval.report.grid import grid_of
from intactkv_eval.storage.files import locked
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.training.distributed import Ranks


def both(arguments, folder, seconds=300):
    """Two commands that begin together: their exit codes, and what each printed."""
    logs = [folder / f"log{number}.txt" for number in range(2)]
    pids = [forked.begin(each, log) for each, log in zip(arguments, logs, strict=True)]
    codes = [forked.ended(pid, seconds) for pid in pids]
    return codes, [log.read_text(errors="replace").strip() for log in logs]


@pytest.fixture
def shared(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    "name",
    ["calibrate", "capture", "pivots", "figures", "kv-codebook", "report", "judge", pytest.param("eval", marks=pytest.mark.slow), pytest.param("sweep", marks=pytest.mark.slow)],
)  # fmt: skip
def test_two_of_the_same(staged, shared, tmp_path, name):
    """One of them may be refused with a message; what is there in the end is what one alone makes."""
    alone = tmp_path / "alone"
    alone.mkdir()
    assert forked.run(staged[name].arguments(alone), tmp_path / "log.txt") == 0
    arguments = staged[name].arguments(shared)
    codes, said = both([arguments, arguments], tmp_path)
    assert 0 in codes, said
    assert set(codes) <= {0, 2}, said
    for code, text in zip(codes, said, strict=True):
        assert "Traceback" not in text
        assert code == 0 or text.splitlines()[-1].startswith("intactkv: ")
    assert staged[name].end(shared) == staged[name].end(alone)
    assert not [path.name for path in shared.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_cells_on_one_response_cache(staged, shared, tmp_path):
    """One of them is its owner; the other is told to name a file of its own, and writes nothing."""
    first = staged["eval"].arguments(shared)
    second = [part.replace("bits=3", "bits=4") for part in first]
    codes, said = both([first, second], tmp_path)
    assert sorted(codes) == [0, 2], said
    refused = said[codes.index(2)].splitlines()[-1]
    assert "--use_cache: this file holds the answers of another cell" in refused
    assert len(list((shared / "out").rglob("results_*.json"))) == 1


class Hook:
    def __init__(self, path):
        self.dbdict = SqliteDict(path, autocommit=True)


def test_of_many_cells_that_begin_at_once_one_owns_the_cache(tmp_path):
    """All have opened the empty file before the first one claims it."""
    hooks = [Hook(tmp_path / "cache.db") for _ in range(8)]
    start, won, lost = threading.Barrier(len(hooks)), [], []

    def claim(number):
        start.wait()
        try:
            guard_response_cache(hooks[number], {"cell": {"number": number}})
            won.append(number)
        except ConfigError:
            lost.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(hooks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == len(hooks) - 1
    guard_response_cache(Hook(tmp_path / "cache.db"), {"cell": {"number": won[0]}})


def test_half_a_file_of_another_process_is_not_ours(tmp_path):
    """It was begun after ours was whole; that it has no samples yet is no fault of ours."""
    before = results_below(tmp_path)
    (tmp_path / "results_2026-01-01T00-00-01.json").write_text(json.dumps({"configs": {"t": {}}}))
    (tmp_path / "samples_t_2026-01-01T00-00-01.jsonl").write_text("{}\n")
    (tmp_path / "results_2026-01-01T00-00-02.json").write_text('{"configs": {"t"')
    check_written(tmp_path, before, True, ["2026-01-01T00-00-01"])
    with pytest.raises(Exception, match="written in part"):
        check_written(tmp_path, before, True, ["2026-01-01T00-00-02"])
    with pytest.raises(Exception, match="could not write its results"):
        check_written(tmp_path, before, True, ["2026-01-01T00-00-03"])


@pytest.mark.parametrize("content", [b"", b"12345\n", b"\xff" * 100])
def test_a_stale_lock_holds_nobody(tmp_path, content):
    """What a killed process leaves is a file; the lock itself has ended with it."""
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.path.mkdir()
    (sweep.path / ".lock").write_bytes(content)
    with sweep.alone(), pytest.raises(ConfigError, match="another sweep works on it"), sweep.alone():
        pass
    (tmp_path / "lock").write_bytes(content)
    os.utime(tmp_path / "lock", (2**31, 2**31))  # of tomorrow: no age decides
    with locked(tmp_path / "lock", wait=False) as ours:
        assert ours


def test_two_judges_at_one_folder(tmp_path):
    with opened(tmp_path), pytest.raises(ConfigError, match="another intactkv judge is writing"), opened(tmp_path):
        pass
    with opened(tmp_path) as journal:
        assert not journal.lines


def test_a_clock_that_goes_back(tmp_path):
    """The dates that runs record decide which is the newest, whatever their files' names and times; none is lost."""
    write_results(tmp_path, 3, 1)
    files = sorted(tmp_path.rglob("results_*.json"))
    content = json.loads(files[1].read_text())
    for name, date, value in (("later", 1.8e9 + 9, 0.25), ("back", 1.0, 0.75)):
        content["date"], content["results"]["task_00"]["acc,none"] = date, value
        files[1].with_name(f"results_{name}.json").write_text(json.dumps(content))
    runs, _ = collect([tmp_path])
    assert len(runs) == 5
    (entry,) = [row.entries for row in grid_of(runs).rows if row.run.path.name == "results_later.json"]
    assert [one.found.score.value for one in entry.values()] == [0.25]


def test_one_calibration_at_a_time_writes_a_file(tmp_path):
    """The second is refused before it touches what the first one keeps beside the file; a stale lock refuses nobody."""
    out, alone = tmp_path / "c.safetensors", Ranks(0, 1)
    (tmp_path / ".c.safetensors.writing").write_text("of a killed one")
    with (
        writing_alone(out, alone),
        pytest.raises(ConfigError, match="another intactkv calibrate is writing it"),
        writing_alone(out, alone),
    ):
        pass
    with writing_alone(out, alone), writing_alone(out, Ranks(1, 2)):  # processes of one calibration
        pass
    with locked(tmp_path / "held" / ".c.safetensors.lock"), writing_alone(tmp_path / "held" / out.name, alone):
        pass  # a sweep's own lock around what it makes
    (tmp_path / "held" / ".c.safetensors.lock").unlink()
    (tmp_path / "held").rmdir()
    assert not list(tmp_path.iterdir())
