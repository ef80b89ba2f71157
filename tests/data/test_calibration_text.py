"""Calibration samples: the windows that a seed names, and the hash that tells them."""

import json
import random

import pytest
import torch
from helpers.tiny import BOS

from intactkv_eval.data import calibration_text
from intactkv_eval.data.calibration_text import load_samples
from intactkv_eval.errors import ConfigError, DataError


class Bytes:
    """One token a byte."""

    def __call__(self, text, **options):
        assert options["add_special_tokens"] is False
        return type("Encoded", (), {"input_ids": list(text.encode())})


TEXT = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=900))


def test_windows_of_a_text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    samples = load_samples(str(path), Bytes(), 5, 40, seed=3)
    draw = random.Random(3)
    for window in samples.tokens:
        start = draw.randint(0, 860)
        assert bytes(window.tolist()).decode() == TEXT[start : start + 40]
        assert BOS not in window
    assert samples.record().items() >= {"source": "a.txt", "samples": 5, "length": 40, "seed": 3}.items()
    again, other = (load_samples(str(path), Bytes(), 5, 40, seed=seed) for seed in (3, 4))
    assert again.digest == samples.digest != other.digest


def test_lines_of_a_jsonl_file_are_joined(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": part}) for part in ("one", "two")))
    assert bytes(load_samples(str(path), Bytes(), 1, 8).tokens[0].tolist()).decode() == "one\n\ntwo"
    path.write_text('{"text": "one"}\n{"words": 3}')
    with pytest.raises(DataError, match=r"line 2: expected an object with the field 'text'"):
        load_samples(str(path), Bytes(), 1, 3)


def test_c4_takes_long_documents_once_each(monkeypatch):
    documents = [TEXT[:30], TEXT[100:250], TEXT[300:320], TEXT[400:600], TEXT[700:890]]
    monkeypatch.setattr(calibration_text, "load_dataset", lambda *args, **options: {"text": documents})
    found = [bytes(window.tolist()).decode() for window in load_samples("c4", Bytes(), 3, 100).tokens]
    owners = [next(place for place, text in enumerate(documents) if window in text) for window in found]
    assert sorted(owners) == [1, 3, 4]
    with pytest.raises(DataError, match="3 of 5 documents have more than 100 tokens, 4 are needed"):
        load_samples("c4", Bytes(), 4, 100)


def test_pile_joins_short_documents(monkeypatch):
    class Rows(dict):
        def shuffle(self, seed):
            return Rows(text=sorted(self["text"], key=len, reverse=bool(seed)))

    rows = Rows(text=[" abc ", "d" * 513, "efghij"])
    monkeypatch.setattr(calibration_text, "load_dataset", lambda *args, **options: rows)
    windows = load_samples("pile", Bytes(), 3, 3).tokens
    assert [bytes(window.tolist()).decode() for window in windows] == ["abc", "efg", "hij"]
    with pytest.raises(DataError, match="9 tokens in documents"):
        load_samples("pile", Bytes(), 4, 3)


@pytest.mark.parametrize(
    ("source", "count", "length", "error", "message"),
    [
        ("wikitext", 1, 8, ConfigError, "use wikitext2, c4, pile, or a .txt or .jsonl file"),
        ("missing.txt", 1, 8, ConfigError, "missing.txt"),
        ("short", 1, 8, DataError, "5 tokens, but one window has 8"),
        ("short", 0, 8, ConfigError, "0 samples"),
    ],
)
def test_bad_requests(source, count, length, error, message, tmp_path):
    if source == "short":
        source = tmp_path / "short.txt"
        source.write_text("abcde")
    with pytest.raises(error, match=message):
        load_samples(str(source), Bytes(), count, length)


def test_tokens_are_whole_numbers(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    assert load_samples(str(path), Bytes(), 1, 8).tokens[0].dtype == torch.int64
