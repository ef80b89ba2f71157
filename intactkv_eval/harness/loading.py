"""What transformers makes of a folder that it cannot load, as one message."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig

from intactkv_eval.errors import CheckpointError, ConfigError, IntactKVError

_OURS = "intactkv_eval"
_LOADERS = {"lm_eval", "transformers", "tokenizers", "huggingface_hub", "safetensors"}

_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_MOST = 10_000


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


def check_layers(pretrained: str, revision: str) -> None:
    """Raise CheckpointError for a config with more layers than any model has, which transformers would begin to build.

    What has no config.json is left to transformers.
    """
    found: dict[str, Any] = {}
    with suppress(OSError):
        found, _ = PretrainedConfig.get_config_dict(pretrained, revision=revision)
    for part in (found, *found.values()):
        for key in _LAYERS if isinstance(part, dict) else ():
            if isinstance(part.get(key), int | float) and part[key] > _MOST:
                raise CheckpointError(
                    f"{pretrained}: config.json says {key}={str(part[key])[:20]}; expected at most {_MOST}"
                )


def _innermost(trace: TracebackType | None) -> str:
    """Which of the packages that take part was at work: the last of them on the way down."""
    found = _OURS
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        found = package if package in {_OURS, *_LOADERS} else found
        trace = trace.tb_next
    return found
