"""Sweeps in processes of their own, and a real Ray cluster of this machine."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def figures(folder, below="cells"):
    """Every sample's figures, by unit: what must not depend on how a sweep was run."""
    found = {}
    for path in sorted((Path(folder) / below).rglob("samples_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        unit = path.relative_to(Path(folder) / below).parts[0]
        found[unit] = [(row["doc_id"], row["doc_hash"], row.get("nll"), row.get("acc")) for row in rows]
    return found


def command(folder, *more, file=None):
    """`intactkv sweep` of the folder's grid.yaml, or of `file`, into its folder `out`."""
    arguments = ["sweep", str(file or folder / "grid.yaml"), "--out", str(folder / "out"), *more]
    return subprocess.Popen(
        [sys.executable, "-m", "intactkv_eval.cli", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def processes_of(process):
    try:
        return [process, *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def wait_for(done, folder, process, seconds=120):
    """Until `done` cells are."""
    begun = time.monotonic()
    while len(list((folder / "out" / "cells").glob("*/record.json"))) < done and process.poll() is None:
        assert time.monotonic() - begun < seconds
        time.sleep(0.05)


@contextmanager
def ray_cluster(folder):
    """Its address; two CPUs. What it says goes to a file in `folder`: its daemons would hold a pipe open."""
    short = f"/tmp/ray-{os.getpid()}"  # Ray's sockets allow no long name
    settings = ["--port", "0", "--num-cpus", "2", "--include-dashboard", "false", "--disable-usage-stats"]
    said = Path(folder) / "said.txt"
    with said.open("w") as file:
        subprocess.run(
            [*RAY, "start", "--head", "--temp-dir", short, *settings],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, check=True, timeout=120,
        )  # fmt: skip
    try:
        yield re.search(r"--address='([^']+)'", said.read_text())[1]
    finally:
        with said.open("a") as file:
            subprocess.run([*RAY, "stop", "--force"], stdout=file, stderr=file, check=True, timeout=120)
        shutil.rmtree(short, ignore_errors=True)


def ray_workers():
    """The processes in which Ray runs cells."""
    return [one for one in psutil.process_iter() if "ray::_Actor" in " ".join(one.cmdline())]
