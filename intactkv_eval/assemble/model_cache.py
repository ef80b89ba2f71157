"""Models that the cells of one process share: what was loaded last, and what was quantized from it.

    with Shelf():   # every IntactKVLM that is made inside takes from it, and leaves there what it loaded

A model on the shelf is never changed. It holds one loaded model and one quantized from it, so cells that follow one
another should differ in as little as they can.
"""

from collections.abc import Callable, Hashable
from contextvars import ContextVar, Token

from transformers import PreTrainedModel

_CURRENT: ContextVar["Shelf | None"] = ContextVar("shelf", default=None)


def current_shelf() -> "Shelf | None":
    """The shelf of the innermost `with`, or None."""
    return _CURRENT.get()


class Shelf:
    """At most one loaded model, and at most one that was made from it. Counts what was loaded and made."""

    def __init__(self) -> None:
        self.loads = self.makes = 0
        self._loaded: tuple[Hashable, PreTrainedModel] | None = None
        self._made: tuple[Hashable, PreTrainedModel] | None = None
        self._token: Token[Shelf | None] | None = None

    def __enter__(self) -> "Shelf":
        self._token = _CURRENT.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._token is not None
        _CURRENT.reset(self._token)
        self.clear()

    def clear(self) -> None:
        """Let go of all models."""
        self._loaded = self._made = None

    def loaded(self, key: Hashable, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model of `key`: the one that lies here, else `load()`, once what lies here was let go of."""
        if self._loaded is None or self._loaded[0] != key:
            self.clear()
            self._loaded = key, load()
            self.loads += 1
        return self._loaded[1]

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether others may get `model` too: then it must not be changed."""
        return self._loaded is not None and self._loaded[1] is model

    def made(self, source: PreTrainedModel, key: Hashable, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """What `key` makes of `source`; kept only where `source` lies here."""
        if not self.holds(source):
            return make()
        if self._made is None or self._made[0] != key:
            self._made = None
            self._made = key, make()
            self.makes += 1
        return self._made[1]
