"""A sweep on a real local Ray cluster: the same results as on this machine, also where a worker is killed."""

import errno
import gzip
import importlib.util
import io
import json
import os
import tarfile
import time
from types import SimpleNamespace

import pytest
from helpers.grids import RTN, grid, sweep_of
from helpers.running import command, figures, ray_cluster, ray_workers, wait_for

from intactkv_eval.errors import ConfigError
from intactkv_eval.sweep import on_ray
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.runner import RunLocation

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    with ray_cluster(tmp_path_factory.mktemp("ray")) as address:
        yield address


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_changes_nothing(saved_llama, tmp_path, cluster):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40)
    gptq = {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "data": str(text), "samples": 4, "length": 64}}
    given = grid(saved_llama, weights=[{}, RTN, gptq], kv=[{}, {"kv_bits": 4}, {"kv_bits": 3}, {"kv_bits": 2}])
    calm = tmp_path / "calm"
    calm.mkdir()
    assert all(end.error is None for end in sweep_of(given, calm).run(RunLocation()))
    sweep_of(given, tmp_path)
    process = command(tmp_path, "--executor", "ray", "--address", cluster, "--shared-folder", str(tmp_path / "made"))
    wait_for(4, tmp_path, process)
    actors = ray_workers()
    assert len(actors) == 2
    actors[0].kill()
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert "24 of 24 cells done, 0 failed" in said
    assert figures(tmp_path / "out") == figures(calm / "out")
    record = json.loads(next((tmp_path / "out" / "cells").glob("*/record.json")).read_text())
    assert record["device"] == os.uname().nodename


@needs_ray
@pytest.mark.slow
def test_errors_of_a_cluster(saved_llama, tmp_path, cluster, monkeypatch):
    broken = sweep_of(grid(saved_llama, weights=[{"weights": "rtn", "bits": 3, "group_size": 48}, {}]), tmp_path)
    ended = broken.run(RunLocation("ray", address=cluster, made=tmp_path / "made"))
    assert sorted(bool(end.error) for end in ended) == [False, False, True, True]
    assert all("group_size=48" in end.error for end in ended if end.error)
    large = sweep_of(grid(saved_llama, run={"resources": {"num_gpus": 8}}, seeds=[1]), tmp_path)
    with pytest.raises(ConfigError, match="more than the whole cluster has"):
        large.run(RunLocation("ray", address=cluster))
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="no Ray cluster answers"):
        large.run(RunLocation("ray", address="127.0.0.1:9"))
    assert time.monotonic() - begun < 90


def test_without_ray(saved_llama, tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(on_ray, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install ray"):
        sweep_of(grid(saved_llama), tmp_path).run(RunLocation("ray"))


def test_secrets_stay_with_the_driver():
    names = ["INTACTKV_DATA", "HF_HOME", "HF_TOKEN", "HF_HUB_TOKEN", "OPENAI_API_KEY", "TOKENIZERS_PARALLELISM", "PATH"]
    assert [name for name in names if on_ray._is_passed_on(name)] == [
        "INTACTKV_DATA",
        "HF_HOME",
        "TOKENIZERS_PARALLELISM",
    ]


def test_slots_by_resources():
    cluster = {"CPU": 16.0, "GPU": 4.0, "fast": 3.0}
    assert on_ray._fitting(cluster, {"num_gpus": 1, "num_cpus": 2}) == 4
    assert on_ray._fitting(cluster, {"num_gpus": 0.5, "num_cpus": 4}) == 4
    assert on_ray._fitting(cluster, {"fast": 1}) == 3
    assert on_ray._fitting(cluster, {"num_gpus": 8}) == 0


WHOLE = {"m/results_1.json": b'{"configs": {"t": {}}}', "m/samples_t_1.jsonl": b"{}\n"}


def packed(files, **more):
    """An archive of files; and of a member `x` of which TarInfo says `more`."""
    found = io.BytesIO()
    with tarfile.open(fileobj=found, mode="w:gz") as written:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))
        if more:
            member = tarfile.TarInfo("x")
            for key, value in more.items():
                setattr(member, key, value)
            written.addfile(member)
    return found.getvalue()


def ended(results, folder):
    """How a unit ends whose actor sends `results`."""
    pool = object.__new__(on_ray.RayPool)
    pool._folder = SweepFolder(folder)
    pool._begun = {0: (SimpleNamespace(key="k", label="l"), time.monotonic(), None)}
    pool._ray = SimpleNamespace(
        get=lambda asked: on_ray._Found(results, None, "", "node"),
        exceptions=SimpleNamespace(RayTaskError=ConfigError, RayError=ConfigError),
    )
    return pool._ended(0, None)


def test_what_an_actor_sends_is_its_result(tmp_path):
    assert ended(packed(WHOLE), tmp_path).error is None
    assert (tmp_path / "cells" / "k" / "m" / "results_1.json").read_bytes() == WHOLE["m/results_1.json"]
    assert SweepFolder(tmp_path).is_done("k")


@pytest.mark.parametrize(
    "results",
    [
        b"", packed({}), packed(WHOLE)[:-9], packed(WHOLE)[:-8] + bytes(8), packed(WHOLE) + b"x", gzip.compress(b"no tar" * 999),
        packed({"m/results_1.json": WHOLE["m/results_1.json"]}), packed({**WHOLE, "m/results_2.json": b"{}"}),
        packed({**WHOLE, "m/results_2.json": b'{"configs": 5}'}), packed({**WHOLE, "record.json/x": b""}),
        packed({**WHOLE, "a": b"", "a/b": b""}), packed({**WHOLE, "a/b": b"", "a": b""}), packed({**WHOLE, "a" * 300: b""}),
        packed({**WHOLE, "../x": b""}), packed(WHOLE, type=tarfile.LNKTYPE, linkname="nothing"),
        packed(WHOLE, type=tarfile.SYMTYPE, linkname="m"), packed(WHOLE, pax_headers={"path": "a\0b"}),
        packed(WHOLE, pax_headers={"mtime": "1e300"}),
    ],
    ids=range(18),
)  # fmt: skip
def test_a_damaged_archive_is_that_cells_failure(tmp_path, results):
    """It was taken for a result where only its checksum was wrong, or nothing in it; others ended the whole sweep."""
    end = ended(results, tmp_path)
    assert end.error.startswith("node sent back no results of a run (")
    assert not SweepFolder(tmp_path).is_done("k")
    assert not (tmp_path / ".partial" / "x").exists()


def test_a_full_disk_is_no_damaged_archive(tmp_path, monkeypatch):
    def full(*_arguments, **_named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(OSError, match=r"No space left on device: .*partial"):
        ended(packed(WHOLE), tmp_path)
