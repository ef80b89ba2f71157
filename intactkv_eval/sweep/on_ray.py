"""The pool of a Ray cluster: one actor a slot, as many as the cluster's resources allow, results pulled to the driver.

Nodes need this package, the models (or the hub) and the data; nothing else is shared. What is made once (checkpoints,
levels, trained pivots) lies in a folder of each node, or in one that all of them see (`made`).
"""

import io
import os
import socket
import tarfile
import tempfile
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from intactkv_eval.compat.lm_eval_api import setup_logging
from intactkv_eval.errors import ConfigError, DataError, IntactKVError
from intactkv_eval.sanitize import clean_logs
from intactkv_eval.storage.files import cache_folder
from intactkv_eval.sweep.archive import unpack
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.pool import JobResult
from intactkv_eval.sweep.spec import RunSpec
from intactkv_eval.sweep.work import SweepWorker, WorkerSlot, last_lines, print_into

_SECONDS = 10.0  # for a cluster to answer
_PASSED_ON = ("INTACTKV_", "HF_", "TRANSFORMERS_", "OMP_", "TOKENIZERS_")  # environment of the driver


class _Found(NamedTuple):
    """What an actor sends back: the results' folder as a tar, or the user's error; and what was printed."""

    results: bytes | None
    error: str | None
    log: str
    node: str


class RayPool:
    """address: of the cluster ("auto": the one this machine belongs to). most: slots, at most.

    Raises ConfigError where Ray is not installed, no cluster answers, or it has not the resources of one cell.
    """

    def __init__(self, address: str, folder: SweepFolder, run: RunSpec, made: Path | None, most: int | None) -> None:
        try:
            self._ray: Any = import_module("ray")
        except ModuleNotFoundError:
            raise ConfigError("--executor ray: Ray is not installed; pip install ray") from None
        _check_reachable(address)
        passed = {key: value for key, value in os.environ.items() if _is_passed_on(key)}
        try:
            self._ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": passed})
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"--address {address}: no Ray cluster answers ({error}); ray start --head") from None
        self._folder, self._run, self._made = folder, run, made
        count = min(_fitting(self._ray.cluster_resources(), run.resources), most or 10**6)
        if count < 1:
            self._ray.shutdown()
            raise ConfigError(f"run.resources {run.resources}: more than the whole cluster has; ask for less")
        self.names = tuple(f"actor {place}" for place in range(count))
        self._actors: dict[int, Any] = {}
        self._begun: dict[int, tuple[Unit, float, Any]] = {}

    def submit(self, slot: int, unit: Unit) -> None:
        """Begin, in the slot's actor; in a new one where there is none."""
        if slot not in self._actors:
            actor = self._ray.remote(_Actor).options(max_restarts=0, **_ray_options(self._run.resources))
            self._actors[slot] = actor.remote(self._run, self._made)
        self._begun[slot] = unit, time.monotonic(), self._actors[slot].run.remote(unit)

    def wait(self, seconds: float) -> list[JobResult]:
        """What ended within `seconds`."""
        slots = {asked: slot for slot, (_, _, asked) in self._begun.items()}
        ready, _ = self._ray.wait(list(slots), num_returns=1, timeout=seconds)
        return [self._ended(slots[asked], asked) for asked in ready]

    def close(self) -> None:
        """Let go of the cluster; its actors end with this driver."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    def _ended(self, slot: int, asked: Any) -> JobResult:
        unit, begun, _ = self._begun.pop(slot)
        errors = self._ray.exceptions
        try:
            found: _Found = self._ray.get(asked)
        except errors.RayTaskError as error:
            self._ray.kill(self._actors.pop(slot))  # what it holds may be in any state
            return JobResult(slot, "\n".join(str(error).strip().splitlines()[-6:]), time.monotonic() - begun)
        except errors.RayError as error:  # the actor, its node, or what it sent back is gone
            self._actors.pop(slot)
            return JobResult(slot, f"its actor was lost ({type(error).__name__})", time.monotonic() - begun, died=True)
        seconds = time.monotonic() - begun
        log = self._folder.log(unit.key)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(found.log, encoding="utf-8")
        if found.results is None:
            return JobResult(slot, found.error, seconds)
        try:
            unpack(found.results, self._folder.start(unit.key))
        except DataError as error:
            return JobResult(slot, f"{found.node} sent back no results of a run ({error})", seconds)
        self._folder.place(unit.key, {"unit": unit.label, "seconds": seconds, "device": found.node})
        return JobResult(slot, None, seconds)


class _Actor:
    """A process on a node of the cluster."""

    def __init__(self, run: RunSpec, made: Path | None) -> None:
        self._run = run
        self._made = made or cache_folder() / "sweep"
        setup_logging()
        clean_logs()
        self._workshop = SweepWorker(run).__enter__()

    def run(self, unit: Unit) -> _Found:
        """The unit's results; raises what is not the user's error."""
        with tempfile.TemporaryDirectory() as name:
            log, out = Path(name) / "log.txt", Path(name) / "results"
            out.mkdir()
            print_into(log)
            device = "cuda" if self._run.resources.get("num_gpus") else "cpu"
            responses = self._made / "responses" / unit.key if self._run.use_cache else None
            try:
                self._workshop.run(unit, WorkerSlot(device, self._made, responses), out)
            except IntactKVError as error:
                return _Found(None, str(error), last_lines(log, 10**6), os.uname().nodename)
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w:gz") as written:
                written.add(out, arcname=".")
            return _Found(packed.getvalue(), None, last_lines(log, 10**6), os.uname().nodename)


def _is_passed_on(name: str) -> bool:
    """Of the driver's environment; Ray shows what it is given, so secrets stay where they are."""
    return name.startswith(_PASSED_ON) and not name.endswith(("TOKEN", "KEY"))


def _check_reachable(address: str) -> None:
    """Ray itself waits minutes for a cluster that is not there."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"--address {address}: no Ray cluster answers there ({error}); ray start --head") from None


def _fitting(found: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many times the resources of a cell are in the cluster's."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    shares = [found.get(names.get(name, name), 0.0) / value for name, value in wanted.items() if value > 0]
    return int(min(shares, default=1))


def _ray_options(resources: Mapping[str, float]) -> dict[str, Any]:
    known = {key: value for key, value in resources.items() if key in {"num_cpus", "num_gpus"}}
    others = {key: value for key, value in resources.items() if key not in known}
    return {**known, **({"resources": others} if others else {})}
