"""Work on what a stranger hands over, in a child process that is bound in time and memory.

The child does that work and nothing else, so it is safe beside threads and a GPU; what it made comes back as JSON.
"""

import json
import os
import resource
import select
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_WALL_SECONDS = 60.0  # a child that does not even start


def result_of_child(work: Callable[[], Any], seconds: int, memory: int) -> Any:
    """`work`'s result, which JSON can hold; None where the child did not end by itself.

    seconds: of processor time. memory: bytes that it may take beside what this process has.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads: the child uses no lock of theirs
        child = os.fork()
    if not child:
        try:
            _bind(seconds, memory)
            with os.fdopen(writing, "w") as out:
                json.dump(work(), out)
        finally:
            os._exit(0)  # without what the parent would do on its way out
    os.close(writing)
    try:
        with os.fdopen(reading) as made:
            text = made.read() if select.select([made], [], [], _WALL_SECONDS)[0] else ""
    finally:
        with suppress(ProcessLookupError, ChildProcessError):  # where SIGCHLD is ignored, or another has waited for it
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    try:
        return json.loads(text)
    except ValueError:  # nothing, or half of it: the child was ended
        return None


def _bind(seconds: int, memory: int) -> None:
    """Limits for this process: of processor time, and of memory where the system tells how much it has. No messages."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    own = Path("/proc/self/statm")
    if own.exists():
        taken = int(own.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
