"""JSON and YAML of strangers: a document of plain values, or one kind of error."""

import time
from random import Random

import pytest
import yaml

from intactkv_eval.storage.documents import parse_json, parse_yaml, parse_yaml_of_two
from intactkv_eval.storage.limits import DOCUMENT_DEPTH


def test_documents_are_what_they_say():
    assert parse_json('{"a": [1, 2.5, null, true, "\\u00e9"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert parse_json(b"[]") == []
    assert parse_yaml("a: [1, &x {b: c}, *x]\n") == {"a": [1, {"b": "c"}, {"b": "c"}]}
    assert parse_json("[" * DOCUMENT_DEPTH + "]" * DOCUMENT_DEPTH) is not None
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


def test_many_merges_of_a_long_mapping_end_soon():
    """A megabyte in which nothing multiplies: 20,000 merges of 20,000 keys."""
    lines = [
        "a: &a {" + ", ".join(f"k{n}: 1" for n in range(20_000)) + "}",
        *[f"b{n}: {{<<: *a}}" for n in range(20_000)],
    ]
    begun = time.monotonic()
    with pytest.raises(ValueError, match="merges"):
        parse_yaml("\n".join(lines))
    assert time.monotonic() - begun < 30


def test_a_merge_brings_its_keys():
    found = parse_yaml("a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, {z: 4, x: 5}]}\n")
    assert found == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 3, "z": 4}}


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("{<<: *a, y: 3}", {"x": 1, "y": 3}),
        ("{y: 3, <<: *a}", {"x": 1, "y": 3}),
        ("{<<: [*a, *b]}", {"x": 1, "y": 2, "z": 6}),
        ("{<<: [*b, *a]}", {"x": 1, "y": 5, "z": 6}),
        ("{<<: [*a, *d]}", {"x": 1, "y": 2, "z": 7}),
        ("{<<: [*d, *a]}", {"x": 1, "y": 5, "z": 7}),
        ("{<<: [*d, *d], x: 8}", {"x": 8, "y": 5, "z": 7}),
        ("{<<: {<<: *d, z: 9}}", {"y": 5, "z": 9}),
        ("{<<: []}", {}),
        ("{'<<': *a}", {"<<": {"x": 1, "y": 2}}),
    ],
)
def test_merges_are_those_of_yamls_specification(text, last):
    """Own keys win over merged ones wherever they stand, and earlier mappings over later ones, by what they mean."""
    before = "a: &a {x: 1, y: 2}\nb: &b {y: 5, z: 6}\nd: &d {<<: *b, z: 7}\n"
    assert parse_yaml(f"{before}last: {text}\n")["last"] == last


def test_a_file_that_lm_eval_reads_too_says_the_same_to_both():
    """PyYAML 6.0.4 reads y: 2 out of the second, the specification and 6.0.3 read y: 3."""
    plain, nested = "a: &a {y: 2}\nb: {<<: *a, y: 3}\n", "a: &a {y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: *b}\n"
    assert parse_yaml_of_two(plain) == {"a": {"y": 2}, "b": {"y": 3}}
    if yaml.safe_load(nested)["c"] == {"y": 3}:
        assert parse_yaml_of_two(nested)["c"] == {"y": 3}
    else:
        with pytest.raises(ValueError, match="otherwise than YAML's specification"):
            parse_yaml_of_two(nested)


def test_merges_of_merges_mean_what_they_would_written_out():
    """Random mappings, each of which merges some of those before it, against the rule applied to plain dicts."""
    for seed in range(200):
        draw = Random(seed)
        lines, meant = [], []
        for place in range(8):
            own = {draw.choice("uvwxyz"): draw.randrange(100) for _ in range(draw.randrange(3))}
            parts = [draw.randrange(place) for _ in range(draw.randrange(4))] if place else []
            value = dict(own)
            for part in parts:
                value |= {key: one for key, one in meant[part].items() if key not in value}
            meant.append(value)
            said = [f"{key}: {one}" for key, one in own.items()]
            said.insert(draw.randrange(len(said) + 1), f"<<: [{', '.join(f'*m{part}' for part in parts)}]")
            lines.append(f"m{place}: &m{place} {{{', '.join(said)}}}")
        assert parse_yaml("\n".join(lines)) == {f"m{place}": value for place, value in enumerate(meant)}, lines


@pytest.mark.parametrize(
    ("text", "said"),
    [("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands twice"), ("a: &a {x: 1}\nb: {<<: *a, <<: *a}", "line 2: two merges"),
     ("a: 1\nb: {<<: 1}", "line 2: a merge"), ("b: {<<: [{}, x]}", "line 1: a merge"), ("a: &a {<<: *a}", "into itself"),
     ("a: &a {<<: {<<: *a}}", "into itself"), ("? {a: 1}\n: b", "line 1: a mapping is no key"), ("!!map [1]", "expected a mapping")],
    ids=range(8),
)  # fmt: skip
def test_what_no_mapping_may_say(text, said):
    """Of a key that stands twice PyYAML would drop the first without a word, and parsers differ on which merge wins."""
    with pytest.raises(ValueError, match=said):
        parse_yaml(text)


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
