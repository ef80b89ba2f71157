"""What transformers makes of a folder that it cannot load, as one message."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from safetensors import SafetensorError

from intactkv_eval.errors import CheckpointError, ConfigError, IntactKVError

_OURS = "intactkv_eval"
_LOADERS = {"lm_eval", "transformers", "tokenizers", "huggingface_hub", "safetensors"}


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raises ConfigError for what is not there or not loadable, CheckpointError for files that are damaged.

    A config or a tokenizer that is damaged makes transformers fail with whatever it meets first; a fault of ours, or
    memory that runs out, is passed on as it is.
    """
    try:
        yield
    except (IntactKVError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{what}: a weight file is damaged ({error})") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be loaded: {error}") from error
    except Exception as error:
        if _innermost(error.__traceback__) == _OURS:
            raise
        raise CheckpointError(f"{what}: its files cannot be loaded ({type(error).__name__}: {error})") from error


def _innermost(trace: TracebackType | None) -> str:
    """Which of the packages that take part was at work: the last of them on the way down."""
    found = _OURS
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        found = package if package in {_OURS, *_LOADERS} else found
        trace = trace.tb_next
    return found
