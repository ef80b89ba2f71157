"""The pool of this machine: one process a device, which keeps its models from one unit to the next.

A process ends with the sweep, however that ends: a thread watches the pipe to it. An error that is not the user's ends
the process and nothing else, as a kill would; what it printed is in the unit's log.
"""

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from intactkv_eval.compat.lm_eval_api import setup_logging, without_processes
from intactkv_eval.errors import ConfigError, IntactKVError
from intactkv_eval.model.devices import check_device
from intactkv_eval.sanitize import clean_logs
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import Unit
from intactkv_eval.sweep.pool import JobResult
from intactkv_eval.sweep.spec import RunSpec
from intactkv_eval.sweep.work import SweepWorker, WorkerSlot, last_lines, print_into

_GOODBYE = 10.0  # seconds for an idle process to end by itself
_SPAWN = multiprocessing.get_context("spawn")  # a forked process could not use CUDA


class _Slot(NamedTuple):
    process: BaseProcess
    pipe: Connection


class LocalPool:
    """devices: cpu, cuda:N, or cuda:N+M for cells that are laid over several."""

    def __init__(self, devices: Sequence[str], folder: SweepFolder, run: RunSpec) -> None:
        self.names = tuple(devices)
        self._folder, self._run = folder, run
        self._slots: dict[int, _Slot] = {}
        self._begun: dict[int, tuple[Unit, float]] = {}
        for name in devices:
            device_of(name)

    def submit(self, slot: int, unit: Unit) -> None:
        """Begin, in the slot's process; in a new one where there is none."""
        if slot not in self._slots:
            self._slots[slot] = self._started(self.names[slot])
        self._folder.log(unit.key).unlink(missing_ok=True)
        self._begun[slot] = unit, time.monotonic()
        self._slots[slot].pipe.send(unit)

    def wait(self, seconds: float) -> list[JobResult]:
        """What ended within `seconds`."""
        pipes = {self._slots[slot].pipe: slot for slot in self._begun}
        ready = [pipes[pipe] for pipe in wait(list(pipes), seconds) if isinstance(pipe, Connection)]
        return [self._ended(slot) for slot in sorted(ready)]

    def close(self) -> None:
        """End idle processes and kill the others: what was not finished is done again another time."""
        for number, slot in self._slots.items():
            if number not in self._begun and slot.process.is_alive():
                slot.pipe.send(None)
                slot.process.join(_GOODBYE)
            slot.process.kill()
            slot.process.join()
            slot.pipe.close()
        self._slots, self._begun = {}, {}

    def _started(self, name: str) -> _Slot:
        ours, theirs = _SPAWN.Pipe()
        process = _SPAWN.Process(target=_serve, args=(theirs, name, self._folder, self._run), daemon=True)
        process.start()
        theirs.close()
        return _Slot(process, ours)

    def _ended(self, slot: int) -> JobResult:
        unit, begun = self._begun.pop(slot)
        seconds = time.monotonic() - begun
        try:
            error = self._slots[slot].pipe.recv()
        except (EOFError, OSError):
            process = self._slots.pop(slot).process
            process.join()
            code = process.exitcode or 0
            if code < 0:
                return JobResult(slot, f"its process was killed (signal {-code})", seconds, died=True)
            return JobResult(slot, last_lines(self._folder.log(unit.key)) or f"its process ended with {code}", seconds)
        return JobResult(slot, error, seconds)


def check_slots(devices: Sequence[str]) -> None:
    """Raise ConfigError for a slot that is no device, or one that is not here."""
    for name in devices:
        device, _ = device_of(name)
        for number in name.partition(":")[2].split("+") if device == "cuda" else ():
            check_device(f"cuda:{number}", f"--devices {name}: ")


def device_of(name: str) -> tuple[str, dict[str, str]]:
    """A slot's device in torch's words, and the environment that shows no other. Raises ConfigError."""
    kind, _, listed = name.partition(":")
    numbers = listed.split("+") if listed else []
    if kind == "cpu" and not listed:
        return "cpu", {"CUDA_VISIBLE_DEVICES": ""}
    if kind != "cuda" or not numbers or not all(part.isdigit() for part in numbers):
        raise ConfigError(
            f"--devices {name}: use cpu, cuda:0, or cuda:0+1 for cells over two GPUs; several with commas"
        )
    visible = [part for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
    if visible and max(map(int, numbers)) >= len(visible):
        raise ConfigError(f"--devices {name}: CUDA_VISIBLE_DEVICES shows {len(visible)} devices")
    return "cuda", {"CUDA_VISIBLE_DEVICES": ",".join(visible[int(part)] if visible else part for part in numbers)}


def _serve(pipe: Connection, name: str, folder: SweepFolder, run: RunSpec) -> None:
    device, environment = device_of(name)
    os.environ |= environment
    without_processes()
    setup_logging()
    clean_logs()
    waiting: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, waiting), daemon=True).start()
    with SweepWorker(run) as workshop:
        while True:
            unit = waiting.get()
            if unit is None:
                return
            responses = folder.responses(unit.key) if run.use_cache else None
            print_into(folder.log(unit.key))
            pipe.send(_tried(workshop, unit, WorkerSlot(device, folder.made, responses), folder))


def _tried(workshop: SweepWorker, unit: Unit, place: WorkerSlot, folder: SweepFolder) -> str | None:
    begun = time.monotonic()  # a clock may go back
    try:
        workshop.run(unit, place, folder.start(unit.key))
    except IntactKVError as error:
        return str(error)
    folder.place(unit.key, {"unit": unit.label, "seconds": time.monotonic() - begun, "device": place.device})
    return None


def _listen(pipe: Connection, waiting: "queue.SimpleQueue[Unit | None]") -> None:
    """Hand on what comes; when the sweep is gone, so is this process, whatever it is doing."""
    while True:
        try:
            waiting.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(1)
