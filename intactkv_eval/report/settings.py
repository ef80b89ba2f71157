"""The settings of a score, which many scores of a folder share, and values of strangers as keys of dictionaries."""

import json
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any


class Settings(dict[str, Any]):
    """All that makes two runs of one task the same measurement, beside the model. It is never changed."""

    @cached_property
    def text(self) -> str:
        """As JSON; equal settings have equal texts."""
        return _json(self)

    @cached_property
    def key(self) -> Hashable:
        """Equal exactly where `unlike` finds no setting that differs: a setting that is missing is None."""
        return _key(self)


class SharedSettings:
    """One object for all equal settings of a folder, so that what is made of them is made once."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Settings] = {}

    def of(self, settings: Mapping[str, Any]) -> Settings:
        """The settings, or the equal ones that were given before. Equal values of other types are not equal here."""
        values = tuple(settings.values())
        try:
            return self._known.setdefault((*settings, *values, *map(type, values)), Settings(settings))
        except TypeError:  # a list or a mapping among them
            return Settings(settings)


def text_of(settings: Mapping[str, Any]) -> str:
    """The settings as JSON, in which those of a column are equal."""
    return settings.text if isinstance(settings, Settings) else _json(settings)


def key_of(settings: Mapping[str, Any]) -> Hashable:
    """A key that is equal for settings of equal values; None is like a setting that is missing."""
    return settings.key if isinstance(settings, Settings) else _key(settings)


def frozen(value: Any) -> Hashable:
    """A value of JSON as a key of a dictionary: equal for equal values, and NaN equals nothing but itself."""
    if isinstance(value, Mapping):
        return "{}", frozenset((name, frozen(part)) for name, part in value.items())
    if isinstance(value, list | tuple):
        return "[]", tuple(map(frozen, value))
    hashed: Hashable = value
    return hashed


def _json(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, default=str)


def _key(settings: Mapping[str, Any]) -> Hashable:
    return frozenset((name, frozen(value)) for name, value in settings.items() if value is not None)
