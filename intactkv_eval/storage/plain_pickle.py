"""Pickles of plain values, read by a small machine of our own that can do nothing else.

A pickle is a program. Python's own readers, and torch's with `weights_only`, run no code of a stranger, but a few bytes
can still keep them busy for ever: containers that hold one another twice a level have 2^n parts when a key is hashed or
a text is made of them. Here keys are texts and numbers, the number of steps is limited, and so are the parts of what
comes out, each counted as often as it occurs. What names a class or a function is refused but for `calls`.
"""

import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from io import BytesIO
from typing import Any

from intactkv_eval.storage.limits import DOCUMENT_DEPTH, PICKLE_PARTS, PICKLE_STEPS

_MOST_BITS = 1024  # of a whole number
_KEYS = (str, int, float, bytes, type(None))
# Bytes without which a pickle shares no part and hashes none: DICT, SETITEM(S), DUP, GETs, and those of sets.
_SHARES = re.compile(b"[dsu2ghj\x8f\x90\x91]")
_SHORT = 4096  # bytes of a pickle that Python's own reader, which is four times as fast, may read if it shares nothing
_IGNORED = {"PROTO", "FRAME", "STOP"}
_SCALARS = {
    "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT"}


class _Named:
    """A name that stands in a pickle, and what it stands for."""

    def __init__(self, name: str, call: Any) -> None:
        self.name, self.call = name, call


class _Quick(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain(
    data: bytes, calls: Mapping[str, Any] | None = None, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of a pickle: texts, numbers, bytes, lists, tuples and mappings.

    Args:
        data: The pickle; what follows its end is not looked at.
        calls: Names of classes and functions that it may hold, and the function that is called in their place; None
            for a name that is only mentioned, which then stands for its text.
        persistent: What makes a value of a persistent id.

    Raises:
        pickle.UnpicklingError: It is something else, or larger than its bytes say.
        ValueError: It is damaged.
    """
    if calls is None and persistent is None and len(data) < _SHORT and not _SHARES.search(data):
        return _Quick(BytesIO(data)).load()
    machine = _Machine(calls or {}, persistent)
    for step, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if step >= PICKLE_STEPS:
            raise pickle.UnpicklingError(f"it has more than {PICKLE_STEPS} steps")
        machine.do(operation.name, argument)
    if len(machine.stack) != 1 or machine.marked:
        raise pickle.UnpicklingError("it leaves no value, or several")
    _check_parts(machine.stack[0], 1, {})
    return machine.stack[0]


class _Machine:
    """The stack of values, those below each mark, and the memo."""

    def __init__(self, calls: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._calls, self._persistent = calls, persistent

    def do(self, name: str, argument: Any) -> None:
        """One operation. Raises UnpicklingError for those that plain values do not need."""
        if name in _SCALARS:
            if isinstance(argument, int) and argument.bit_length() > _MOST_BITS:
                raise pickle.UnpicklingError(f"a whole number of more than {_MOST_BITS} bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _PUTS:
            self._memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in _GETS:
            self.stack.append(self._memo[int(argument)])
        elif name in _TUPLES:
            values = self._popped(_TUPLES[name])
            self.stack.append(tuple(values))
        elif name not in _IGNORED:
            self._do_more(name, argument)

    def _do_more(self, name: str, argument: Any) -> None:
        own = getattr(self, f"_on_{name.lower()}", None)
        if own is None:
            raise pickle.UnpicklingError(f"it holds more than plain values ({name})")
        own(argument)

    def _popped(self, count: int) -> list[Any]:
        if count > len(self.stack):
            raise pickle.UnpicklingError("it takes more values than there are")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.marked.pop()
        return taken

    def _last(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise pickle.UnpicklingError(f"it fills a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _set(self, pairs: list[Any]) -> None:
        target = self._last(dict)
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise pickle.UnpicklingError(f"a {type(key).__name__} is a key; only texts and numbers may be")
            target[key] = value

    def _on_mark(self, _: Any) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def _on_pop(self, _: Any) -> None:
        self._popped(1)

    def _on_pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _on_empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _on_empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _on_list(self, _: Any) -> None:
        values = self._since_mark()
        self.stack.append(values)

    def _on_tuple(self, _: Any) -> None:
        values = self._since_mark()
        self.stack.append(tuple(values))

    def _on_dict(self, _: Any) -> None:
        pairs = self._since_mark()
        self.stack.append({})
        self._set(pairs)

    def _on_append(self, _: Any) -> None:
        value = self._popped(1)
        self._last(list).extend(value)

    def _on_appends(self, _: Any) -> None:
        values = self._since_mark()
        self._last(list).extend(values)

    def _on_setitem(self, _: Any) -> None:
        self._set(self._popped(2))

    def _on_setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _on_global(self, argument: str) -> None:
        self._name(argument.replace(" ", "."))

    def _on_stack_global(self, _: Any) -> None:
        self._name(".".join(map(str, self._popped(2))))

    def _name(self, name: str) -> None:
        if name not in self._calls:
            raise pickle.UnpicklingError(f"it names {name[:120]}")
        self.stack.append(_Named(name, self._calls[name]))

    def _on_reduce(self, _: Any) -> None:
        call, arguments = self._popped(2)
        if not isinstance(call, _Named) or call.call is None or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls what is no function")
        self.stack.append(call.call(*arguments))

    def _on_build(self, _: Any) -> None:
        """The state of a mapping, as torch puts beside state dicts, is left out: nothing of it is used."""
        self._popped(1)
        self._last(dict)

    def _on_binpersid(self, _: Any) -> None:
        if self._persistent is None:
            raise pickle.UnpicklingError("it refers to something beside it")
        (named,) = self._popped(1)
        parts = named if isinstance(named, tuple) else (named,)
        self.stack.append(self._persistent(tuple(p.name if isinstance(p, _Named) else p for p in parts)))


def _check_parts(value: Any, depth: int, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many parts a value has, and how many levels. Raises UnpicklingError where either is too many."""
    if isinstance(value, _Named):
        raise pickle.UnpicklingError(f"it names {value.name}")
    if isinstance(value, str | bytes):
        return 1 + len(value) // 16, 0  # a long text that occurs a million times is written out as often
    if not isinstance(value, dict | list | tuple):
        return 1, 0
    size, height = known.get(id(value), (0, 0))
    if depth + height > DOCUMENT_DEPTH:
        raise pickle.UnpicklingError(f"nested more than {DOCUMENT_DEPTH} levels deep, or holds itself")
    if size:
        return size, height
    inside = [_check_parts(part, depth + 1, known) for part in (value.values() if isinstance(value, dict) else value)]
    size, height = 1 + sum(one for one, _ in inside), 1 + max((one for _, one in inside), default=0)
    if size > PICKLE_PARTS:
        raise pickle.UnpicklingError(f"holds more than {PICKLE_PARTS} parts, each as often as it occurs")
    known[id(value)] = size, height
    return size, height
