"""The machine's own compiler on dequantize.c, once; None where there is no compiler, and torch operators do the same.

The library is kept under the user's cache, named by source, processor and flags. It runs on torch's own OpenMP threads:
a second OpenMP runtime beside torch's would fight it for the cores, so none is linked.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("dequantize.c")
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-std=gnu11")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had; the reason is logged."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux":
        logger.info("no C compiler (cc) here: packed weights are dequantized by torch operators, which is slower")
        return None
    for flags in ((*_FLAGS, "-fopenmp", "-mprefer-vector-width=512"), (*_FLAGS, "-fopenmp"), _FLAGS):
        try:
            return _declared(ctypes.CDLL(str(_built(compiler, flags))))
        except (subprocess.SubprocessError, OSError) as error:
            reason = getattr(error, "stderr", None) or str(error)
    logger.warning("dequantize.c cannot be compiled here, torch operators do its work, slower: %s", str(reason)[:300])
    return None


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    identity = [SOURCE.read_text(encoding="utf-8"), compiler, *flags, platform.machine(), _processor()]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("INTACTKV_CACHE") or Path.home() / ".cache" / "intactkv") / "kernels"
    target = folder / f"dequantize-{name}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            unlinked, linked = f"{place}/d.o", f"{place}/d.so"
            for command in ([*flags, "-c", str(SOURCE), "-o", unlinked], ["-shared", unlinked, "-o", linked]):
                subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=120)
            os.replace(linked, target)
    return target


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    for function in (found.dequantize_bf16, found.dequantize_fp32):
        function.argtypes = [_POINTER] * 4 + [_LONG] * 4 + [_POINTER]
        function.restype = None
    return found
