"""Mutations: of bytes, and of values that JSON can hold. All drawn from one random.Random, so a seed is an input."""

import copy
import json
import random

TOKENS = [
    b"\x00", b"\xff" * 8, b"{", b"}", b"[", b"]", b'"', b"null", b"NaN", b"Infinity", b"-1", b"1e999", b"999999999999999999999",
    b"../", b"/etc/passwd", b"<script>", b"{{7*7}}", b"\\u0000", b"\xed\xa0\x80", b"[[7]]", b"[[A]]", b"F32", b"I64", b"&a [*a]",
    b"[" * 3000, b'{"a":' * 300, b"9" * 5000, b"\\ud800", b"2020-99-99", b"!!int abc", b"!!bool x", b"!!timestamp x", b'!!int ""', b"&x {x: *x}",
    b"!!python/object/apply:os.system", b"true", b"0", b"18446744073709551615", b"\n", b"\r\n", b" " * 64,
    b"1" + b":1" * 300 + b".0", b"0x" + b"F" * 5000, b"<<: [*a, *a]",
]  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "none", "../x",
    "/etc/passwd", "\x00", "é" * 300, "a" * 5000, "<script>alert(1)</script>", "{{7*7}}", [], {}, [[]], [None], {"": None}, [1, "x"],
    {"re:(?R)": {}}, {"(?:(?:a{1000}){1000}){1000}": {}}, "tokens:²", "sliding_attention", {"bits": 4}, "4", "NaN", "{0.__class__}", "%s%n", "\ud800", "a } b", int("9" * 4000), 2**24, 2**20, "../../x", json.loads("[" * 150 + "]" * 150),
]  # fmt: skip


def of_bytes(data: bytes, draw: random.Random) -> bytes:
    """One to six changes, most of them near the start, where headers are."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        size = len(found)
        near = draw.random() < 0.6
        place = draw.randrange(min(size, 4096) if near and size else size) if size else 0
        kind = draw.randrange(7)
        if kind == 0 and size:
            found[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and size:
            found[place] = draw.randrange(256)
        elif kind == 2:
            found[place:place] = draw.choice(TOKENS)
        elif kind == 3:
            del found[place : place + draw.choice([1, 2, 8, 64, 1024])]
        elif kind == 4:
            token = draw.choice(TOKENS)
            found[place : place + len(token)] = token
        elif kind == 5:
            other = draw.randrange(size) if size else 0
            found[place:place] = found[other : other + draw.choice([1, 8, 64])]
        elif size and draw.random() < 0.3:
            del found[place:]
    return bytes(found)


def of_value(value, draw: random.Random):
    """One to four changes to a copy: nodes replaced, removed, doubled, renamed or swapped."""
    found = copy.deepcopy(value)
    for _ in range(draw.randint(1, 4)):
        places = list(_places(found))
        if not places:
            return draw.choice(VALUES)
        holder, key = draw.choice(places)
        kind = draw.randrange(6)
        if kind <= 2:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            other_holder, other_key = draw.choice(places)
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif isinstance(holder, dict):
            holder[draw.choice(["", "x", "bits", str(key) * 2, "pretrained", "..."])] = holder.pop(key)
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    return found


GROWING = [
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 40},
    {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "aaaa"},
    {"type": "Prepend", "prepend": "a" * 9000},
]  # fmt: skip


PARTS = ["a", "a+", "\\w+", "\\s*", "[a-z]*", "\\p{L}+", ".", ".*", "a|aa", "(?=a)", "\\1", " ?", "é", "a{2,9}"]
REPEATS, ENDS = ["", "+", "*", "{3}", "*?"], ["", "$", "!", "\\b", "(?!\\S)"]


def of_tokenizer(value, draw: random.Random):
    """A tokenizer.json whose steps grow a text, or are other than they were."""
    steps = [copy.deepcopy(draw.choice(GROWING)) for _ in range(draw.choice([1, 2, 12, 300]))]
    section, inside = draw.choice([("normalizer", "normalizers"), ("decoder", "decoders")])
    grown = {**value, section: {"type": "Sequence", inside: steps}}
    return of_value(grown, draw) if draw.random() < 0.5 else grown


def of_expressions(value, draw: random.Random):
    """A tokenizer.json with regular expressions of random parts, some of which never end."""
    parts = [draw.choice(PARTS) for _ in range(draw.randint(1, 6))]
    expression = "".join(f"({part}){draw.choice(REPEATS)}" if draw.random() < 0.5 else part for part in parts)
    step = {"type": "Split", "pattern": {"Regex": f"({expression}){draw.choice(REPEATS)}{draw.choice(ENDS)}"},
            "behavior": "Isolated", "invert": False}  # fmt: skip
    return {**value, "pre_tokenizer": step}


def of_json(value, draw: random.Random) -> bytes:
    """A changed value as JSON, now and then with its bytes changed too."""
    data = json.dumps(of_value(value, draw)).encode("utf-8", "surrogatepass")
    return of_bytes(data, draw) if draw.random() < 0.25 else data


def _places(value):
    if isinstance(value, dict):
        for key, part in value.items():
            yield value, key
            yield from _places(part)
    elif isinstance(value, list):
        for key, part in enumerate(value):
            yield value, key
            yield from _places(part)
