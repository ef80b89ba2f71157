"""Python's garbage collector, set aside while many values are made that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """No search for unreachable cycles: over a million values that all stay it takes as long as making them.

    What is no longer needed, and is in no cycle, is given back all the same. Then it is as before.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
