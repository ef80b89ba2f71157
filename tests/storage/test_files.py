"""Writing that is never seen half done; shipped folders."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from intactkv_eval.quantize.export import export
from intactkv_eval.storage.files import place_folder, shipped_folder, write_atomic
from intactkv_eval.storage.tensor_file import save_tensors
from intactkv_eval.weights.formats.scheme import CheckpointScheme


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    target = tmp_path / "deep" / "file.txt"
    write_atomic(target, lambda partial: partial.write_text("old"))

    def fail(partial):
        partial.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_atomic(target, fail)
    assert target.read_text() == "old"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, expected):
    """Results, pivots and checkpoints are shared; tempfile and safetensors would keep them to their owner."""
    ours, theirs = tmp_path / "ours.txt", tmp_path / "theirs.safetensors"
    before = os.umask(umask)
    try:
        write_atomic(ours, lambda partial: partial.write_text("x"))
        write_atomic(theirs, lambda partial: save_tensors(partial, {"x": torch.ones(2)}))
        export(tmp_path / "checkpoint", "gptq", CheckpointScheme(4, 32, True, "a test"), {}, {}, {"x": torch.ones(2)})
    finally:
        os.umask(before)
    for path in (ours, theirs, *(tmp_path / "checkpoint").iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) == expected, path.name


def test_what_is_put_in_its_place_is_on_disk_before(tmp_path, monkeypatch):
    """A power cut after the rename would otherwise leave a whole name for an empty file."""
    order, real = [], (os.fsync, os.replace, Path.replace)
    monkeypatch.setattr(
        os, "fsync", lambda handle: order.append(os.readlink(f"/proc/self/fd/{handle}")) or real[0](handle)
    )
    monkeypatch.setattr(os, "replace", lambda *ends: order.append("renamed") or real[1](*ends))
    monkeypatch.setattr(Path, "replace", lambda *ends: order.append("renamed") or real[2](*ends))
    write_atomic(tmp_path / "file.txt", lambda partial: partial.write_text("new"))
    assert order.index("renamed") == 1
    assert order[0].endswith(".partial")
    order.clear()
    (tmp_path / "made" / "deep").mkdir(parents=True)
    for name in ("one", "deep/two"):
        (tmp_path / "made" / name).write_text(name)
    place_folder(tmp_path / "made", tmp_path / "whole")
    assert {Path(path).name for path in order[:2]} == {"one", "two"}
    assert order[2:] == ["renamed", str(tmp_path)]
    assert (tmp_path / "whole/deep/two").read_text() == "deep/two"


def test_a_folder_goes_with_its_lock_while_others_wait(tmp_path):
    """Each waits for the lock inside of it, and takes all away at the end."""
    script = (
        "import sys, pathlib\n"
        "from intactkv_eval.storage.files import locked, remove_folder\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for turn in range(60):\n"
        "    with locked(folder / 'lock'):\n"
        "        (folder / 'work').write_text('x')\n"
        "        remove_folder(folder)\n"
    )
    made = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "work")]) for _ in range(4)]
    assert [one.wait() for one in made] == [0] * 4
    assert not list(tmp_path.iterdir())


def test_shipped_folders_are_the_checkouts():
    assert (shipped_folder("tasks") / "ppl" / "ppl_wikitext2.yaml").is_file()
    assert (shipped_folder("model_configs") / "chat_templates" / "vicuna_v1.1.jinja").is_file()
