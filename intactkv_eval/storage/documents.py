"""JSON and YAML from strangers: a document of plain values, or a ValueError that says why not. Knows no key.

Of pickles, which are read elsewhere, what a damaged one may raise.
"""

import json
import pickle
import re
import struct
from collections.abc import Hashable
from typing import Any, NamedTuple

import yaml

from intactkv_eval.storage.limits import DOCUMENT_DEPTH, DOCUMENT_VALUES, YAML_BYTES, YAML_MERGED_KEYS, human_size

# A pickle is a program: a damaged one fails with whatever it comes to (the pickle module's own documentation says so).
BROKEN_PICKLE = (pickle.PickleError, EOFError, AttributeError, ImportError, LookupError, ValueError, TypeError,
                 AssertionError, ArithmeticError, RuntimeError, struct.error, OSError)  # fmt: skip
_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)  # of JSON; one that does not end goes to the end
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape of half a character outside of the first 65,536
_MERGE, _VALUE, _FLOAT, _INT = (f"tag:yaml.org,2002:{name}" for name in ("merge", "value", "float", "int"))
_BROKEN_YAML = (yaml.YAMLError, ValueError, RecursionError, KeyError, AttributeError, IndexError, TypeError)


class _Merged(NamedTuple):
    """A mapping with its merges brought in. size: its keys, were every merge written out and nothing overridden."""

    values: dict[Hashable, yaml.Node]
    size: int


class _Loader(yaml.SafeLoader):
    """PyYAML's, for strangers: merges cannot multiply, and a number is one in which nothing is base 60 or endless.

    Merges are our own, since releases of PyYAML disagree: 6.0.4 gives a mapping that overrides a merged key the value
    that it overrides, where it is merged in turn.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._brought_in = 0
        self._merged: dict[yaml.Node, _Merged | None] = {}  # None while it is being made

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of `node`, as https://yaml.org/type/merge.html has it."""
        if not isinstance(node, yaml.MappingNode):
            raise ValueError(f"{_line(node)}: expected a mapping, found a {type(node).__name__}")
        values = self._with_merges(node).values
        return {key: self.construct_object(value, deep=deep) for key, value in values.items()}

    def _with_merges(self, node: yaml.MappingNode) -> _Merged:
        """Its own keys, then those of `<<` that it has not; of several mappings in `<<` the first that has a key wins.

        What is merged stands for all that it means itself, merges included. Keys are counted before they are brought
        in, because each level of merges can multiply the last's. Raises ValueError.
        """
        if node in self._merged:
            known = self._merged[node]
            if known is None:
                raise ValueError(f"{_line(node)}: a merge (<<) brings a mapping into itself")
            return known
        self._merged[node] = None
        parts = self._merges_of(node)
        own = self._own(node)
        values: dict[Hashable, yaml.Node] = {}
        size = len(own)
        for part in parts:
            brought = self._with_merges(part)
            size += brought.size
            self._brought_in += brought.size
            if self._brought_in > YAML_MERGED_KEYS:
                raise ValueError(f"merges (<<) bring in more than {YAML_MERGED_KEYS} keys: write them out")
            for key, value in brought.values.items():
                values.setdefault(key, value)
        made = self._merged[node] = _Merged({**values, **own}, size)
        return made

    def _own(self, node: yaml.MappingNode) -> dict[Hashable, yaml.Node]:
        """The keys that stand in the mapping itself. Raises ValueError for one that stands there twice."""
        found: dict[Hashable, yaml.Node] = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"{_line(key_node)}: a {key_node.id} is no key; write a text or a number")
            key = "=" if key_node.tag == _VALUE else self.construct_object(key_node)
            if key in found:
                raise ValueError(f"{_line(key_node)}: the key {key!r:.80} stands twice in one mapping; keep one")
            found[key] = value
        return found

    @staticmethod
    def _merges_of(node: yaml.MappingNode) -> list[yaml.MappingNode]:
        """The mappings that its `<<` names, in their order. Raises ValueError for anything else there."""
        merges = [(key, value) for key, value in node.value if key.tag == _MERGE]
        if len(merges) > 1:
            raise ValueError(f"{_line(merges[1][0])}: two merges (<<) in one mapping; write one, <<: [*first, *second]")
        found: list[yaml.MappingNode] = []
        for key, value in merges:
            for part in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(part, yaml.MappingNode):
                    raise ValueError(f"{_line(key)}: a merge (<<) takes a mapping or a list of them, found a {part.id}")
                found.append(part)
        return found

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


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def parse_json(text: str | bytes) -> Any:
    """The document. Half characters become U+FFFD, so that every text can be written again.

    Raises ValueError for what is no JSON, no UTF-8, nested deeper than 100 levels, of more than ten million values, or
    a number that is too long.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    if _parts(text) > DOCUMENT_VALUES and _parts(_TEXT.sub("", text)) > DOCUMENT_VALUES:
        raise ValueError(f"holds more than {DOCUMENT_VALUES} values")
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    if text.count("[") + text.count("{") > DOCUMENT_DEPTH:
        _measured(found, 1, {})
    return _whole(found) if _HALF.search(text) else found


def parse_yaml(text: str) -> Any:
    """The document: mappings, lists, texts, numbers, true, false and null.

    It means the same on every release of PyYAML. Raises ValueError for what is no YAML, refers to itself, has a key
    twice, or holds other values, as dates are; also for numbers of base 60 or of more than 64 bits, and for merges (<<)
    of very many keys.
    """
    if len(text) > YAML_BYTES:
        raise ValueError(f"a YAML of {len(text):,} characters; expected at most {human_size(YAML_BYTES)}")
    try:
        found = yaml.load(text, _Loader)
    except _BROKEN_YAML as error:  # PyYAML's own converters let all of these through
        raise ValueError(f"no YAML: {error}") from None
    _measured(found, 1, {})
    return _whole(found)


def parse_yaml_of_two(text: str) -> Any:
    """`parse_yaml` of a file that lm_eval reads once more, with PyYAML's own loader.

    Raises ValueError also where that reads another document out of it, as releases do whose merges are their own.
    """
    found = parse_yaml(text)
    if "<<" in text and yaml.safe_load(text) != found:
        raise ValueError(
            f"PyYAML {yaml.__version__}, with which lm_eval reads it, resolves its merges (<<) otherwise than YAML's "
            "specification does: write the merged keys out"
        )
    return found


def _too_deep() -> str:
    return f"nested more than {DOCUMENT_DEPTH} levels deep, or refers to itself"


def _parts(text: str) -> int:
    """How many values a JSON text holds, about, where nothing stands within quotes."""
    return text.count(",") + text.count("[") + text.count("{")


def _measured(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values it holds, and how many levels; each object once. Raises ValueError."""
    if not isinstance(value, dict | list):
        if value is not None and not isinstance(value, str | int | float):
            raise ValueError(f"{value!r:.80} is a {type(value).__name__}: put it in quotes")
        return 1, 0
    size, height = known.get(id(value), (0, 0))
    if depth + height > DOCUMENT_DEPTH:
        raise ValueError(_too_deep())
    if size:
        return size, height
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    found = [_measured(part, depth + 1, known) for part in parts]
    made = 1 + sum(size for size, _ in found), 1 + max((height for _, height in found), default=0)
    if made[0] > DOCUMENT_VALUES:
        raise ValueError(f"holds more than {DOCUMENT_VALUES} values once its aliases are written out")
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
