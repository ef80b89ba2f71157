"""ModelCache: models that the cells of one process share."""

from collections.abc import Callable, Hashable

from transformers import PreTrainedModel


class ModelCache:
    """What was loaded last, and what was quantized from it; counts loads and derivations.

    A model in the cache is never changed. It holds one loaded model and one derived from it, so cells that follow one
    another should differ in as little as they can.
    """

    def __init__(self) -> None:
        self.loads = self.derivations = 0
        self._loaded: tuple[Hashable, PreTrainedModel] | None = None
        self._derived: tuple[Hashable, PreTrainedModel] | None = None

    def clear(self) -> None:
        """Drop all models."""
        self._loaded = self._derived = None

    def get_or_load(self, key: Hashable, load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The model of `key`: the cached one, else `load()`, once the cached ones were dropped."""
        if self._loaded is None or self._loaded[0] != key:
            self.clear()
            self._loaded = key, load()
            self.loads += 1
        return self._loaded[1]

    def owns(self, model: PreTrainedModel) -> bool:
        """Whether other cells may get `model` too: then it must not be changed."""
        return self._loaded is not None and self._loaded[1] is model

    def get_or_derive(
        self, source: PreTrainedModel, key: Hashable, derive: Callable[[], PreTrainedModel]
    ) -> PreTrainedModel:
        """What `key` derives from `source`; kept only where the cache owns `source`."""
        if not self.owns(source):
            return derive()
        if self._derived is None or self._derived[0] != key:
            self._derived = None
            self._derived = key, derive()
            self.derivations += 1
        return self._derived[1]
