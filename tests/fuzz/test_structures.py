"""hypothesis over the same readers: whole documents in which parts are replaced by any other, shrunk where one fails.

The fuzzer (run.py) damages bytes and values it knows; here the values come from hypothesis: every kind of number, text
and nesting, under the names that the document itself uses.
"""

import copy
import os

import pytest
import run
import seeds
import targets as fuzzed
from helpers.tiny import byte_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("INTACTKV_FUZZ_EXAMPLES", "60"))


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("structures")
    seeds.make_seeds(folder, byte_tokenizer())
    return {name: one for name, one in fuzzed.targets(folder).items() if one.value is not None}


def words_of(value):
    """Names and texts of a document."""
    if isinstance(value, dict):
        return {*map(str, value), *(word for part in value.values() for word in words_of(part))}
    if isinstance(value, list):
        return {word for part in value for word in words_of(part)}
    return {value} if isinstance(value, str) and len(value) < 40 else set()


def values(words):
    text = st.sampled_from(sorted(words)) | st.text(max_size=12)
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | text
    return st.recursive(
        leaf, lambda part: st.lists(part, max_size=3) | st.dictionaries(text, part, max_size=3), max_leaves=6
    )


def changed(value, other, draw):
    """`value`, where one part, or all of it, is `other`'s."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(other)
    place = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    value[place] = changed(value[place], other, draw)
    return value


@pytest.mark.parametrize(
    "kind", ["answers", "cell", "choice", "config", "index", "plan", "results", "samples", "sweep"]
)
def test_any_document_is_read_or_refused(targets, kind):
    found = [one for name, one in targets.items() if name.partition("-")[0] == kind]
    read = dict.fromkeys(("read", "refused"), 0)

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def check(data):
        target = data.draw(st.sampled_from(range(len(found))))
        value = copy.deepcopy(found[target].value)
        for _ in range(data.draw(st.integers(1, 3))):
            value = changed(value, values(words_of(found[target].value)), data.draw)
        ended = run.read_one(found[target], found[target].dump(value), fresh=False)
        assert ended in read, ended
        read[ended] += 1

    check()
    assert read["refused"]
