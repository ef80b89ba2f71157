"""The fuzzer in short, what it found before, and that it finds what is to be found."""

import json
import time
import warnings
from pathlib import Path
from random import Random

import pytest
import run
import seeds
import targets as fuzzed
from helpers.tiny import byte_tokenizer

INPUTS = 2000


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    seeds.make_seeds(folder, byte_tokenizer())
    return fuzzed.targets(folder)


def test_every_input_is_read_or_refused(targets):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends, failures = run.fuzz(targets, INPUTS, 20261122, None)
    assert failures == {}
    for name in targets:
        read, refused = ends[name, "read"], ends[name, "refused"]
        assert read + refused == INPUTS // len(targets) + (sorted(targets).index(name) < INPUTS % len(targets))
        assert refused or name == "reply", f"{name}: nothing is refused, so nothing was damaged"


@pytest.mark.parametrize("path", sorted(path for path in run.FOUND.rglob("*") if path.is_file()), ids=lambda p: p.name)
def test_what_was_found_before(targets, path):
    assert run.read_one(targets[path.parent.name], path.read_bytes()) in {"read", "refused"}


def test_a_fault_is_seen(monkeypatch):
    """Each kind of bad end, by a reader that has it."""

    def hangs(_data):
        while True:
            pass

    def takes(_data):
        return len(bytearray(run.BYTES + 2**28))

    def breaks(_data):
        raise KeyError("x")

    def waits(_data):
        time.sleep(2)

    ends = {name: run.read_one(fuzzed.Target(bytes, read), b"") for name, read in
            {"hangs": hangs, "takes": takes, "breaks": breaks, "reads": len}.items()}  # fmt: skip
    assert ends["hangs"] == "took more than 5 s"
    assert ends["takes"].endswith("GB")
    assert ends["breaks"].startswith("KeyError")
    assert ends["reads"] == "read"
    monkeypatch.setattr(run, "SECONDS", 0.5)
    assert run.read_one(fuzzed.Target(bytes, waits), b"") == "took more than 0.5 s"
    monkeypatch.setattr(run, "queued", time.monotonic)  # as on a machine that is busy with other work all the while
    assert run.read_one(fuzzed.Target(bytes, waits), b"") == "read"


def test_the_same_seed_is_the_same_input(targets):
    for name, target in targets.items():
        assert target.make(Random(f"0/{name}/1")) == target.make(Random(f"0/{name}/1"))


def test_no_file_is_left_outside(targets, tmp_path, monkeypatch):
    """Names in files cannot reach beyond the folder: an index that names a file elsewhere is refused unread."""
    outside = Path(tmp_path / "model.safetensors")
    outside.write_bytes(b"secret")
    name = next(name for name in targets if name.startswith("index"))
    for said in ("../model.safetensors", str(outside), "a/../../model.safetensors", "..\\model.safetensors"):
        data = json.dumps({"weight_map": {"a": said}}).encode()
        assert run.read_one(targets[name], data) == "refused"
