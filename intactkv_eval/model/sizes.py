"""What a config describes against what the weight files can fill, before a byte of it is allocated.

A config of a few bytes can describe experts, positions or masks of gigabytes. transformers allocates what it does not
find in the files, and fills it with random numbers, before it says what was missing. Knows no format.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from intactkv_eval.errors import CheckpointError
from intactkv_eval.storage.limits import CODES_TIMES, MODULES, SPARE_BYTES, WEIGHTS_TIMES


def check_fits(model: nn.Module, name: str, files: Iterable[str | Path], quantized: bool) -> None:
    """Raise CheckpointError for a model that its files cannot fill, or that lie outside of the model's folder.

    Args:
        model: The model of the config, its tensors on meta.
        name: The model's, for the message; a folder, or a name on the hub.
        files: The weight files.
        quantized: Whether they hold codes of a few bits for each weight.
    """
    places = [os.path.abspath(file) for file in files]
    _check_inside(name, places)
    held = sum(os.stat(place).st_size for place in places)
    times = CODES_TIMES if quantized or any(place.endswith(".gguf") for place in places) else WEIGHTS_TIMES
    for kind, tensors, most in (
        ("weights", dict(model.named_parameters()), times * held + SPARE_BYTES),
        ("buffers", dict(model.named_buffers()), held + SPARE_BYTES),
    ):
        needed = sum(_bytes(tensor) for tensor in tensors.values())
        if needed > most:
            largest = max(tensors, key=lambda one: _bytes(tensors[one]))
            raise CheckpointError(
                f"{name}: config.json describes {kind} of {needed / 2**30:.1f} GiB (the largest is {largest} "
                f"{list(tensors[largest].shape)}), and the weight files have {held / 2**30:.2f} GiB: they cannot be of "
                "this model. Take config.json and the weights of one release"
            )


@contextmanager
def bound_modules(name: str) -> Iterator[None]:
    """While it lasts, raises CheckpointError where a model of more modules than any is built."""
    count = 0

    def counted(*_: object) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise CheckpointError(f"{name}: config.json describes a model of more than {MODULES:,} modules")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _check_inside(name: str, places: list[str]) -> None:
    """The files of a folder lie in it, those of the hub in one snapshot: no index can name others."""
    folder = os.path.abspath(name) if os.path.isdir(name) else os.path.dirname(min(places, default="", key=len))
    strange = next((place for place in places if os.path.commonpath([folder, place]) != folder), None)
    if strange is not None:
        raise CheckpointError(f"{name}: its index names {strange}, which is outside of its folder")
