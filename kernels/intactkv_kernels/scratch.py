"""Scratch memory kept from call to call: taken anew from the system for every layer it costs more than filling it."""

import threading

import torch
from torch import Tensor

_HELD = threading.local()


def room(count: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's scratch of that dtype, [count]; the thread's next call overwrites it."""
    held: Tensor | None = getattr(_HELD, str(dtype), None)
    if held is None or held.numel() < count:
        with torch.inference_mode(False):  # scratch of inference mode could not be written outside of it
            held = torch.empty(count, dtype=dtype)
        setattr(_HELD, str(dtype), held)
    return held[:count]
