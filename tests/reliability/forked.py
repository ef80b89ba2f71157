"""Commands in processes that begin with everything imported, so that a kill meets the work and not the imports."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from tqdm import tqdm


def begin(arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> int:
    """`intactkv ARGUMENTS` in a process group of its own; its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        os.environ.update(environment or {})
        with log.open("ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(place, "w", closefd=False) for place in (1, 2))  # not pytest's own
        tqdm.set_lock(threading.RLock())  # its own lock is shared by all forks, and a killed one never lets go
        code = _run(arguments)
    except BaseException:  # noqa: BLE001  a child never comes back to the tests
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> int:
    from intactkv_eval.cli import main

    sys.argv = ["intactkv", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def ended(pid: int, seconds: float) -> int | None:
    """Its exit code (negative: the signal) where it ends within `seconds`."""
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def kill(pid: int) -> None:
    """SIGKILL to all of its group; it is gone when this returns."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def run(arguments: list[str], log: Path, seconds: float = 600) -> int:
    """To its end. Raises TimeoutError."""
    pid = begin(arguments, log)
    code = ended(pid, seconds)
    if code is None:
        kill(pid)
        raise TimeoutError(f"{arguments}: not ended in {seconds} s")
    return code
