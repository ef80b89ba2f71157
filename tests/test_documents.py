"""JSON and YAML of strangers: a document of plain values, or one kind of error."""

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
     "? [a]\n: b"],
    ids=range(16),
)  # fmt: skip
def test_what_is_no_yaml_of_plain_values(text):
    with pytest.raises(ValueError, match=r".+"):
        parse_yaml(text)


def test_aliases_do_not_multiply():
    """Ten levels of ten aliases each are ten billion values, in a file of a few hundred bytes."""
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 11)]
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml("\n".join(lines))


def test_half_characters_can_be_written_again():
    found = parse_json(r'{"a\ud800": ["\udc00x", "\ud83d\ude00", "plain"]}')
    assert found == {"a�": ["�x", "😀", "plain"]}
    str(found).encode()
    parse_yaml('a: "\\ud800"')["a"].encode()
