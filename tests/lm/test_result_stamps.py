"""No run replaces or mixes the results of another, whatever the clock says: files are named by dates that are free."""

import json
import os
import threading
import time
from datetime import datetime

import pytest
from lm_eval.loggers import evaluation_tracker

from intactkv_eval.lm.evaluate_task import check_written
from intactkv_eval.lm.result_stamps import stamps_of_results

MOMENT = datetime(2026, 11, 29, 1, 30, 0, 999_998)
SAMPLE = {"doc_id": 0, "arguments": [("a", "b")], "resps": [], "filtered_resps": [], "target": "t", "doc_hash": "h",
          "prompt_hash": "h", "target_hash": "h"}  # fmt: skip


class Frozen(datetime):
    @classmethod
    def now(cls, tz=None):
        return MOMENT


@pytest.fixture
def frozen(monkeypatch):
    monkeypatch.setattr(evaluation_tracker, "datetime", Frozen)


def save(out, number):
    """A run as lm_eval writes it: results, then samples."""
    tracker = evaluation_tracker.EvaluationTracker(output_path=str(out))
    tracker.general_config_tracker.model_name_sanitized = "m"
    tracker.save_results_aggregated(results={"number": number, "configs": {"t": {}}}, samples={"t": [SAMPLE]})
    tracker.save_results_samples(task_name="t", samples=[{**SAMPLE, "target": str(number)}])


def read(folder):
    """Of each results file its number, and those of the samples beside it."""
    found = []
    for path in sorted(folder.glob("*.json")):
        samples = path.with_name(f"samples_t_{path.stem.rpartition('_')[2]}.jsonl").read_text().splitlines()
        found.append((json.loads(path.read_text())["number"], [int(json.loads(line)["target"]) for line in samples]))
    return sorted(found)


@pytest.mark.parametrize("name", ["out", "out.json"])
def test_runs_of_one_microsecond_are_all_kept(frozen, tmp_path, name):
    """999,998 and 999,999 microseconds, then the next second, whose date has no fraction."""
    folder = tmp_path if name.endswith(".json") else tmp_path / name / "m"
    for number in range(4):
        with stamps_of_results() as stamps:
            save(tmp_path / name, number)
        check_written(tmp_path / name, {}, True, stamps)
    assert read(folder) == [(number, [number]) for number in range(4)]
    assert evaluation_tracker.datetime is Frozen
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_samples_alone_hold_their_date(frozen, tmp_path):
    """Of a run whose results a person has removed: other samples are not put behind them."""
    (tmp_path / "m").mkdir()
    left = tmp_path / "m" / f"samples_other_{MOMENT.isoformat().replace(':', '-')}.jsonl"
    left.write_text("{}\n")
    with stamps_of_results() as stamps:
        save(tmp_path, 1)
    assert left.read_text() == "{}\n"
    assert stamps == ["2026-11-29T01-30-00.999999"]


class Slow(Frozen):
    """Between the look at what is there and the writing others have time to come."""

    @classmethod
    def now(cls, tz=None):
        time.sleep(0.05)
        return MOMENT


def test_processes_of_one_microsecond_are_all_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluation_tracker, "datetime", Slow)
    children = []
    for number in range(6):
        child = os.fork()
        if not child:
            code = 1
            try:
                with stamps_of_results():
                    save(tmp_path, number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert read(tmp_path / "m") == [(number, [number]) for number in range(6)]


def test_a_stale_lock_and_a_folder_that_cannot_be_written(frozen, tmp_path):
    """Who was killed left a lock that holds nobody; what cannot be written is lm_eval's to find."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".results.lock").write_text("left")
    done = threading.Event()

    def run():
        with stamps_of_results():
            save(tmp_path, 1)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    assert done.wait(20)
    assert read(tmp_path / "m") == [(1, [1])]
    (tmp_path / "file").write_text("")
    with stamps_of_results() as stamps:
        save(tmp_path / "file" / "below", 2)
    with pytest.raises(Exception, match="could not write its results"):
        check_written(tmp_path / "file" / "below", {}, False, stamps)
