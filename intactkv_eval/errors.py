"""The errors a user can cause. Each message names the thing, what was expected, what came, and the fix."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from intactkv_eval.sanitize import clean

_PANIC = "PanicException"  # of no module that can be imported


class IntactKVError(Exception):
    """Base of every error that is the user's to mend; the command line turns it into one message and exit code 2.

    Its text is shown without control characters and credentials, since names in it may come from a stranger's file.
    """

    def __str__(self) -> str:
        return clean(super().__str__())


class ConfigError(IntactKVError):
    """A key, a value, a combination of keys or a YAML file that does not describe a cell."""


class CheckpointError(IntactKVError):
    """Model weights that are missing, damaged, or do not fit what was asked of them."""


class PivotError(IntactKVError):
    """Pivot tokens that cannot be found, or a PivotKV that does not belong to this model."""


class UnsupportedModelError(IntactKVError):
    """An architecture that the pivot cannot be given to, or that cannot be quantized whole."""


class NumericsError(IntactKVError):
    """NaN or infinite numbers where an answer was to be computed; the message names where they first appear."""


class DataError(IntactKVError):
    """A data set or a text that is missing, too short, or not in a layout we read."""


@contextmanager
def panics_named(what: str) -> Iterator[None]:
    """Raise CheckpointError where a library in Rust panics, as tokenizers does: its error is no Exception of Python."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != _PANIC:
            raise
        raise CheckpointError(
            f"{what}: the tokenizers library fails on its tokenizer.json, or on a text by it ({str(error)[:300]}); "
            "take the tokenizer of the model's makers"
        ) from None


def unknown_key(key: str, known: "tuple[str, ...] | list[str]") -> ConfigError:
    """The error for a key nobody reads, with the nearest right name."""
    near = get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(sorted(known))}"
    return ConfigError(f"unknown argument {key!r}: {hint}")
