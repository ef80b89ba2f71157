"""Whatever process of ours a log record comes from, it is without control characters and credentials."""

import logging
from types import SimpleNamespace

import pytest

from intactkv_eval.cli import main as cli
from intactkv_eval.lm import harness_flags as flags
from intactkv_eval.sweep import local, on_ray


class Begun(Exception):
    """The work of a process would begin here."""


@pytest.fixture(autouse=True)
def plain_logs():
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    yield
    logging.setLogRecordFactory(before)


def of_the_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["intactkv", "tasks"])
    with pytest.raises(SystemExit):
        cli.main()


def of_lm_eval(monkeypatch):
    flags.begin_command()


def of_a_sweeps_process(monkeypatch):
    def begin(*_):
        raise Begun

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(local, "_listen", lambda *_: None)
    for name in ("setup_logging", "without_processes"):
        monkeypatch.setattr(local, name, lambda: None)
    monkeypatch.setattr(local, "SweepWorker", begin)
    with pytest.raises(Begun):
        local._serve(None, "cpu", None, SimpleNamespace(use_cache=False))


def of_an_actor(monkeypatch):
    def begin(*_):
        raise Begun

    monkeypatch.setattr(on_ray, "setup_logging", lambda: None)
    monkeypatch.setattr(on_ray, "SweepWorker", begin)
    with pytest.raises(Begun):
        on_ray._Actor(SimpleNamespace(share=False), None)


@pytest.mark.parametrize("begin", [of_the_command, of_lm_eval, of_a_sweeps_process, of_an_actor])
def test_every_process_writes_clean_records(monkeypatch, capsys, begin):
    begin(monkeypatch)
    record = logging.getLogRecordFactory()("n", logging.ERROR, "f", 1, "a\x1b[2Jb %s", ("\x07c\u202e",), None)
    assert record.getMessage() == "ab c"
