"""A disk that is full, and one that cannot be written: a clear error, and what was there before is as it was."""

import os
import subprocess
from contextlib import contextmanager

import pytest
from helpers import forked, works

SMALL = {"pivots", "kv-codebook"}  # whose files have a few hundred bytes


@contextmanager
def mounted(folder, *options):
    folder.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip("no file system can be mounted here: needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def state(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [name for name in works.WORKS if name != "sweep"])
def test_a_full_disk(staged, tmp_path, name):
    """The folder holds an earlier result and room for almost nothing; with room again the same command ends well."""
    with mounted(tmp_path / "disk", "-o", "size=64k") as disk:
        (disk / "earlier.json").write_text("{}")
        statistics = os.statvfs(disk)
        free = statistics.f_bavail * statistics.f_bsize
        (disk / "filler").write_bytes(bytes(free - (0 if name in SMALL else 8192)))
        before = state(disk)
        code = forked.run(staged[name].arguments(disk), tmp_path / "log.txt")
        said = (tmp_path / "log.txt").read_text(errors="replace")
        assert code == 2, said[-2000:]
        last = said.strip().splitlines()[-1]
        assert last.startswith("intactkv: ")
        assert "disk full" in last or "No space left" in last, last
        assert staged[name].end(disk) is None, "nothing half-written is taken for a result"
        after = state(disk)
        assert before.items() <= after.items()
        assert not [path for path in after if path.endswith(".partial")]
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        if name == "eval":  # which takes ten seconds each time
            return
        assert forked.run(staged[name].arguments(disk), tmp_path / "log.txt") == 0, (tmp_path / "log.txt").read_text()
        assert staged[name].end(disk)


@pytest.mark.parametrize("name", works.WORKS)
def test_a_folder_that_cannot_be_written(staged, tmp_path, name):
    with mounted(tmp_path / "disk", "-o", "size=1m") as disk:
        arguments = staged[name].arguments(disk)
        before = state(disk)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        code = forked.run(arguments, tmp_path / "log.txt")
        said = (tmp_path / "log.txt").read_text(errors="replace")
        assert code == 2, said[-2000:]
        assert "Read-only file system" in said.strip().splitlines()[-1]
        assert state(disk) == before


def test_a_full_disk_leaves_a_sweep_whole(staged, tmp_path):
    """Cells that did not fit are failed ones; with room again the same command does them, and them alone."""
    with mounted(tmp_path / "disk", "-o", "size=220k") as disk:
        arguments = staged["sweep"].arguments(disk)
        forked.run(arguments, tmp_path / "log.txt")
        some = staged["sweep"].end(disk) or {}
        subprocess.run(["mount", "-o", "remount,size=16m", str(disk)], check=True)
        assert forked.run(arguments, tmp_path / "log.txt") == 0, (tmp_path / "log.txt").read_text()[-2000:]
        whole = staged["sweep"].end(disk)
        assert len(whole) == 12
        assert some.items() <= whole.items()
