"""JSON and YAML from strangers: a document of plain values, or a ValueError that says why not. Knows no key.

Of pickles, which are read elsewhere, what a damaged one may raise.
"""

import json
import pickle
import re
import struct
from typing import Any

import yaml

DEEPEST = 100  # levels; what walks through a document later may recurse
# A pickle is a program: a damaged one fails with whatever it comes to (the pickle module's own documentation says so).
BROKEN_PICKLE = (pickle.PickleError, EOFError, AttributeError, ImportError, LookupError, ValueError, TypeError,
                 AssertionError, ArithmeticError, RuntimeError, struct.error, OSError)  # fmt: skip
_MOST = 10_000_000  # values of a YAML once its aliases are written out
_MOST_MERGED = 100_000  # keys that merges (<<) bring in, all together
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of half a character outside of the first 65,536
_MERGE, _FLOAT, _INT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "float", "int"))
_BROKEN_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, IndexError, TypeError)


class _Loader(yaml.SafeLoader):
    """PyYAML's, for strangers: merges cannot multiply, and a number is one in which nothing is base 60 or endless."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Bring in the keys of `<<`. They are counted first, because each level of merges can multiply the last's."""
        for key, value in node.value:
            if key.tag == _MERGE:
                for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if isinstance(part, yaml.MappingNode):  # PyYAML says what is wrong with any other
                        self.flatten_mapping(part)
                    self._merged += len(part.value)
                    if self._merged > _MOST_MERGED:
                        raise ValueError(f"merges (<<) bring in more than {_MOST_MERGED} keys: write them out")
        super().flatten_mapping(node)

    def number(self, node: yaml.ScalarNode) -> int | float:
        """What `node` says. Raises ValueError for one of base 60 (1:30), and for a whole one of more than 64 bits."""
        said = str(self.construct_scalar(node))
        if ":" in said:
            raise ValueError(f"{said:.80} is a number of base 60: put it in quotes")
        if node.tag == _FLOAT:
            return float(self.construct_yaml_float(node))
        found = int(self.construct_yaml_int(node))
        if not -(2**63) <= found < 2**64:
            raise ValueError(f"{said:.80} is a number of more than 64 bits")
        return found


for _tag in (_FLOAT, _INT):
    _Loader.add_constructor(_tag, _Loader.number)


def parse_json(text: str | bytes) -> Any:
    """The document. Half characters become U+FFFD, so that every text can be written again.

    Raises ValueError for what is no JSON, no UTF-8, nested deeper than 100 levels, or a number that is too long.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if text.count("[") + text.count("{") > DEEPEST:
        _measured(found, 1, {})
    return _whole(found) if _HALF.search(text) else found


def parse_yaml(text: str) -> Any:
    """The document: mappings, lists, texts, numbers, true, false and null.

    Raises ValueError for what is no YAML, refers to itself, or holds other values, as dates are; also for numbers of
    base 60 or of more than 64 bits, and for merges (<<) of very many keys.
    """
    try:
        found = yaml.load(text, _Loader)
    except _BROKEN_YAML as error:  # PyYAML's own converters let all of these through
        raise ValueError(f"no YAML: {error}") from None
    _measured(found, 1, {})
    return _whole(found)


def _too_deep() -> str:
    return f"nested more than {DEEPEST} levels deep, or refers to itself"


def _measured(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values it holds, and how many levels; each object once. Raises ValueError."""
    if not isinstance(value, dict | list):
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"{value!r:.80} is a {type(value).__name__}: put it in quotes")
        return 1, 0
    size, height = known.get(id(value), (0, 0))
    if depth + height > DEEPEST:
        raise ValueError(_too_deep())
    if size:
        return size, height
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    found = [_measured(part, depth + 1, known) for part in parts]
    made = 1 + sum(size for size, _ in found), 1 + max((height for _, height in found), default=0)
    if made[0] > _MOST:
        raise ValueError(f"holds more than {_MOST} values once its aliases are written out")
    known[id(value)] = made
    return made


def _whole(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(part) for part in value]
    if isinstance(value, dict):
        return {_whole(key): _whole(part) for key, part in value.items()}
    return value
