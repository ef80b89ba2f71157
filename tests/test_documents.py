"""JSON and YAML of strangers: a document of plain values, or one kind of error."""

import time

import pytest

from intactkv_eval.documents import DEEPEST, parse_json, parse_yaml


def test_documents_are_what_they_say():
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json(b"[]") == []
    assert parse_yaml("a: [1, &x {b: c}, *x]\n") == {"a": [1, {"b": "c"}, {"b": "c"}]}
    assert parse_json("[" * DEEPEST + "]" * DEEPEST) is not None
    assert parse_json("[" + "[]," * 500 + "[]]") == [[]] * 501, "many lists are not deep ones"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 5000, "[" * 101 + "]" * 101, '{"a":' * 102 + "1" + "}" * 102, "9" * 5000, b"\xff", "{'a': 1}"],
    ids=range(8),
)
def test_what_is_no_json(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


@pytest.mark.parametrize(
    "text",
    ["a: [", "2020-99-99", "a: 2020-01-01", "!!int abc", "!!bool x", "!!timestamp x", '!!int ""', "0x_", "a: &x {x: *x}",
     "[" * 3000, "9" * 5000, "!!python/object/apply:os.system [ls]", "!!set {a, b}", "!!binary aGk=", "1: {2: !!set {a}}",
     "? [a]\n: b", "a: &a {<<: *a}", "!!int [1]"],
    ids=range(18),
)  # fmt: skip
def test_what_is_no_yaml_of_plain_values(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_yaml(text)


def test_aliases_do_not_multiply():
    """Ten levels of ten aliases each are ten billion values, in a file of a few hundred bytes."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml("\n".join(lines))


@pytest.mark.parametrize(
    "merge", [lambda n: f"<<: [{', '.join([f'*a{n}'] * 10)}]", lambda n: ", ".join([f"<<: *a{n}"] * 10)]
)
def test_merges_do_not_multiply(merge):
    """Six levels of ten merges each are a million keys; PyYAML by itself took seconds for these, minutes for eight levels."""
    lines = ["a0: &a0 {k: v}"] + [f"a{n}: &a{n} {{{merge(n - 1)}}}" for n in range(1, 7)]
    begun = time.monotonic()
    with pytest.raises(ValueError, match="merges"):
        parse_yaml("\n".join(lines))
    assert time.monotonic() - begun < 5


def test_a_merge_brings_its_keys():
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, {z: 4, x: 5}]}\n")
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 3, "z": 4}}


@pytest.mark.parametrize(
    ("text", "said"),
    [("1:30", "base 60"), ("a: 1" + ":1" * 200_000, "base 60"), ("a: 1" + ":1" * 200 + ".0", "base 60"), ("!!float 1:2", "base 60"),
     ("0x" + "F" * 5000, "64 bits"), (f"{{{2**64}: 1}}", "64 bits"), (f"[{-(2**63) - 1}]", "64 bits")],
    ids=range(7),
)  # fmt: skip
def test_numbers_that_no_key_means(text, said):
    """Base 60 took seconds to compute or ended in OverflowError, and no message could show thousands of digits."""
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


def test_numbers_of_64_bits():
    text = "[18446744073709551615, -9223372036854775808, 0x10, 1_000, 1.5, 1.0e+3, .inf, '1:30']"
    assert parse_yaml(text) == [2**64 - 1, -(2**63), 16, 1000, 1.5, 1000.0, float("inf"), "1:30"]


def test_half_characters_can_be_written_again():
    found = parse_json(r'{"a\ud800": ["\udc00x", "\ud83d\ude00", "plain"]}')
    assert found == {"a�": ["�x", "😀", "plain"]}
    str(found).encode()
    parse_yaml('a: "\\ud800"')["a"].encode()
