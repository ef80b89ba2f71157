"""Durations are told by a clock that never goes back; the time of day is for dates alone."""

import ast
import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import intactkv_eval
from intactkv_eval.sweep import local, on_ray
from intactkv_eval.sweep.progress import Progress
from intactkv_eval.sweep.work import WorkerSlot

PACKAGE = Path(intactkv_eval.__file__).parent
DATES = {"judge/run.py": 1}  # when a reply came


@pytest.fixture
def backwards(monkeypatch):
    """The time of day goes back an hour each time that it is asked for."""
    hours = itertools.count()
    monkeypatch.setattr(time, "time", lambda: 1.8e9 - 3600 * next(hours))


def test_a_cell_took_no_negative_time(backwards, tmp_path):
    placed = []
    folder = SimpleNamespace(start=lambda key: tmp_path, place=lambda key, record: placed.append(record))
    workshop = SimpleNamespace(run=lambda *arguments: None)
    assert local._tried(workshop, SimpleNamespace(key="k", label="l"), WorkerSlot("cpu", tmp_path), folder) is None
    assert 0 <= placed[0]["seconds"] < 60


@pytest.mark.parametrize("module", [local.LocalPool, on_ray.RayPool])
def test_a_slot_tells_no_negative_time(backwards, module):
    """From what is handed out until it ends."""
    unit = SimpleNamespace(key="k", label="l")
    pool = module.__new__(module)
    sent = SimpleNamespace(send=lambda unit: None, recv=lambda: "an error")
    run = SimpleNamespace(remote=lambda unit: None)
    pool._slots, pool._actors = {0: SimpleNamespace(pipe=sent)}, {0: SimpleNamespace(run=run)}
    pool._begun, pool._run = {}, SimpleNamespace(resources={})
    log = SimpleNamespace(
        unlink=lambda **_: None, parent=SimpleNamespace(mkdir=lambda **_: None), write_text=lambda *_, **__: 0
    )
    pool._folder = SimpleNamespace(log=lambda key: log)
    found = on_ray._Found(None, "an error", "", "node")
    pool._ray = SimpleNamespace(
        get=lambda _: found, exceptions=SimpleNamespace(RayTaskError=KeyError, RayError=OSError)
    )
    pool.submit(0, unit)
    ended = pool._ended(0) if module is local.LocalPool else pool._ended(0, None)
    assert ended.error == "an error"
    assert 0 <= ended.seconds < 60


def test_the_table_of_a_sweep_counts_on(backwards):
    progress = Progress(["cpu"], 2, str)
    assert "0 failed, 0 min" in str(progress._shown().renderables[0].title)


def test_the_time_of_day_is_for_dates_alone():
    found = {}
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        count = sum(isinstance(call, ast.Attribute) and ast.unparse(call) == "time.time" for call in calls)
        if count:
            found[str(path.relative_to(PACKAGE))] = count
    assert found == DATES
