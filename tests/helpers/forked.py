"""Commands in processes that begin with everything imported, so that a kill meets the work and not the imports.

They are forked from a process of their own that has imported what they need and has done nothing: a fork of a process
whose libraries have started threads is no whole one.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from importlib import import_module
from pathlib import Path

_IMPORTED = ("cli.main", "commands.evaluate", "commands.capture", "commands.quantize", "commands.calibrate",
             "commands.judge", "sweep.runner", "commands.find_pivots", "commands.figures", "commands.kv_codebook")  # fmt: skip
_parent: list[subprocess.Popen] = []


def begin(arguments: list[str], log: Path) -> int:
    """`intactkv ARGUMENTS` in a process group of its own, its output behind `log`'s; its number."""
    return _asked("begin", arguments, str(log))


def ended(pid: int, seconds: float) -> int | None:
    """Its exit code (negative: the signal) where it ends within `seconds`."""
    return _asked("ended", pid, seconds)


def kill(pid: int) -> None:
    """SIGKILL to all of its group; it is gone when this returns."""
    _asked("kill", pid)


def run(arguments: list[str], log: Path, seconds: float = 600) -> int:
    """To its end. Raises TimeoutError."""
    pid = begin(arguments, log)
    code = ended(pid, seconds)
    if code is None:
        kill(pid)
        raise TimeoutError(f"{arguments}: not ended in {seconds} s")
    return code


def _asked(what: str, *values):
    if not _parent:
        program = [sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        _parent.append(
            subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        )
        atexit.register(_parent[0].kill)
    process = _parent[0]
    process.stdin.write(json.dumps([what, *values]) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def _serve() -> None:
    """What the parent of all does: fork, wait, kill, as it is asked; it ends with its input."""
    from tqdm import tqdm

    for name in _IMPORTED:
        import_module(f"intactkv_eval.{name}")
    import_module("matplotlib.pyplot")
    works = {"begin": _begin, "ended": _ended, "kill": _kill}
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    for line in sys.stdin:
        what, *values = json.loads(line)
        tqdm.set_lock(threading.RLock())  # its own lock is shared by all forks, and a killed one never lets go
        replies.write(json.dumps(works[what](*values)) + "\n")
        replies.flush()


def _begin(arguments: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with open(log, "ab", buffering=0) as file, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(place, "w", closefd=False) for place in (1, 2))
        code = _main(arguments)
    except BaseException:  # noqa: BLE001  a child never comes back
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _main(arguments: list[str]) -> int:
    from intactkv_eval.cli.main import main

    sys.argv = ["intactkv", *arguments]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _ended(pid: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def _kill(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve()
