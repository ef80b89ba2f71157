"""Who gets which unit, and what becomes of units that fail and of processes that die. No processes here."""

from dataclasses import dataclass, field

import pytest

from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.pool import JobResult
from intactkv_eval.sweep.schedule import next_unit, run_units


@dataclass(frozen=True)
class Unit:
    key: str
    model: int = 0
    weights: tuple = (False, 0, 0)


def unit(name):
    """a0-1: model a, weights 0, its second cell."""
    return Unit(name, ord(name[0]), (False, int(name[1]), 0))


def chosen(waiting, last, others=()):
    found = next_unit([unit(n) for n in waiting], unit(last) if last else None, [unit(n) for n in others])
    return found.key


@pytest.mark.parametrize(
    ("waiting", "last", "others", "wanted"),
    [
        (["a0-0", "b0-0"], None, [], "a0-0"),
        (["a0-1", "b0-0"], None, ["a0-0"], "b0-0"),
        (["a0-1", "b0-0", "b1-0"], "b0-1", ["a0-0"], "b0-0"),
        (["a0-1", "a1-0", "b1-0"], "b0-1", ["a0-0"], "b1-0"),
        (["a0-1", "a1-0", "c0-0"], "b0-1", ["a0-0"], "a1-0"),
        (["a0-1", "a0-2"], "b0-1", ["a0-0"], "a0-2"),
    ],
)
def test_a_slot_stays_with_what_it_has_loaded(waiting, last, others, wanted):
    assert chosen(waiting, last, others) == wanted


@dataclass
class Script:
    """A pool whose units end as they are told: None done, "x" failed, "died" once per mention."""

    ends: dict
    names: tuple = ("one", "two")
    order: list = field(default_factory=list)
    running: dict = field(default_factory=dict)

    def submit(self, slot, unit):
        assert slot not in self.running
        self.order.append((slot, unit.key))
        self.running[slot] = unit

    def wait(self, seconds):
        slot = min(self.running)
        unit = self.running.pop(slot)
        left = self.ends.get(unit.key)
        if isinstance(left, list):
            return [JobResult(slot, left.pop(0), 1.0, died=True)] if left else [JobResult(slot, None, 1.0)]
        return [JobResult(slot, left, 1.0)]

    def close(self):
        pass


def run(ends, names, folder, retries=2):
    pool, seen = Script(ends), []
    ended = run_units([unit(n) for n in names], pool, SweepFolder(folder), retries, seen.append, lambda state: None)
    assert seen == ended
    return pool, {end.unit.key: end.error for end in ended}


def test_every_unit_ends_once(tmp_path):
    names = ["a0-0", "a0-1", "a1-0", "b0-0", "b0-1"]
    pool, ended = run({"a0-1": "broken"}, names, tmp_path)
    assert sorted(ended) == names
    assert [name for name in names if ended[name]] == ["a0-1"]
    assert sorted(key for _, key in pool.order) == names
    assert (tmp_path / "failed" / "a0-1.json").read_text().count("broken") == 1


def test_what_died_is_tried_again_but_not_for_ever(tmp_path):
    names = ["a0-0", "a0-1"]
    pool, ended = run({"a0-0": ["killed"] * 2, "a0-1": ["killed"] * 5}, names, tmp_path)
    assert ended == {"a0-0": None, "a0-1": "killed, 3 times"}
    assert [key for _, key in pool.order].count("a0-0") == 3
    assert run({"a0-0": ["killed"]}, ["a0-0"], tmp_path, retries=0)[1] == {"a0-0": "killed"}
