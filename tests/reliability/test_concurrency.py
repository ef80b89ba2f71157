"""Eight processes at the same thing: one does the work, or all agree; nothing is corrupted."""

import random
import time

import pytest
from helpers import forked

EIGHT = 8


@pytest.fixture
def alone(staged, tmp_path):
    """What one process makes."""

    def made(name):
        folder = tmp_path / "alone"
        folder.mkdir()
        assert forked.run(staged[name].arguments(folder), folder / "log.txt") == 0
        return staged[name].end(folder)

    return made


def together(work, folder):
    folder.mkdir(exist_ok=True)
    logs = [folder.parent / f"log{number}.txt" for number in range(EIGHT)]
    return [forked.begin(work.arguments(folder), log) for log in logs], logs


@pytest.mark.parametrize("name", ["capture", "quantize"])
def test_all_agree(staged, alone, tmp_path, name):
    wanted = alone(name)
    pids, logs = together(staged[name], tmp_path / "shared")
    codes = [forked.ended(pid, 300) for pid in pids]
    said = [log.read_text(errors="replace") for log in logs]
    late = [text for code, text in zip(codes, said, strict=True) if code == 2]
    assert set(codes) <= {0, 2}, said
    assert codes.count(0) >= 1
    assert all("already holds something" in text for text in late), late
    assert staged[name].end(tmp_path / "shared") == wanted
    assert not [path.name for path in (tmp_path / "shared").iterdir() if path.name.startswith(".")]


def test_some_of_them_killed(staged, alone, tmp_path):
    """A process that waits goes on where the killed one was."""
    wanted = alone("quantize")
    draw = random.Random(3)
    pids, logs = together(staged["quantize"], tmp_path / "shared")
    for pid in pids[:4]:
        time.sleep(draw.uniform(0, 0.3))
        if forked.ended(pid, 0) is None:
            forked.kill(pid)
    codes = [forked.ended(pid, 300) for pid in pids[4:]]
    assert set(codes) <= {0, 2}, [log.read_text(errors="replace")[-500:] for log in logs]
    assert staged["quantize"].end(tmp_path / "shared") == wanted
