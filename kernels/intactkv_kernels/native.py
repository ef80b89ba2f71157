"""The machine's own compiler on the C files here, once; None where there is none, and torch operators serve.

The library is kept under the user's cache, named by sources, processor and flags. It runs on torch's own OpenMP
threads: a second OpenMP runtime beside torch's would fight it for the cores, so none is linked.
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

SOURCES = tuple(Path(__file__).with_name(name) for name in ("planes.h", "planes.c", "planes_tiles.c", "dequantize.c"))
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fPIC", "-std=gnu11")
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_PLANES = [_POINTER] * 3 + [_LONG] * 5  # the weight, as planes.c takes it


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where it cannot be had; the reason is logged."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform != "linux":
        logger.info("no C compiler (cc) here: packed weights are multiplied by torch operators, which is slower")
        return None
    for flags in ((*_FLAGS, "-fopenmp", "-mprefer-vector-width=512"), (*_FLAGS, "-fopenmp"), _FLAGS):
        try:
            return _declared(ctypes.CDLL(str(_built(compiler, flags))))
        except (subprocess.SubprocessError, OSError) as error:
            reason = getattr(error, "stderr", None) or str(error)
    logger.warning("the CPU kernels cannot be compiled, torch operators do their work, slower: %s", str(reason)[:300])
    return None


def has_planes() -> bool:
    """Whether the library is there and the processor can run planes.c (AVX-512 with bf16)."""
    found = library()
    return found is not None and bool(found.has_planes())


def _built(compiler: str, flags: tuple[str, ...]) -> Path:
    identity = [*(source.read_text(encoding="utf-8") for source in SOURCES), compiler, *flags]
    name = hashlib.sha256("\n".join([*identity, platform.machine(), _processor()]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("INTACTKV_CACHE") or Path.home() / ".cache" / "intactkv") / "kernels"
    target = folder / f"kernels-{name}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = {source: f"{place}/{source.stem}.o" for source in SOURCES if source.suffix == ".c"}
            linked = f"{place}/kernels.so"
            compiled = [[*flags, "-c", str(source), "-o", unlinked] for source, unlinked in made.items()]
            for command in (*compiled, ["-shared", *made.values(), "-o", linked]):
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
    if found.has_planes():
        found.planes_product.argtypes = [*_PLANES, _POINTER, _LONG, _POINTER]
        found.planes_dequantize.argtypes = [*_PLANES, *[_LONG] * 3, _POINTER]
        found.planes_dequantize.restype = None
    return found
