"""Regular expressions of a tokenizer.json that never end, and panics of the library that reads them: one message."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from intactkv_eval.assemble.tokenizer_expressions import KNOWN, endless_expression, first_slow
from intactkv_eval.cli.main import main
from intactkv_eval.errors import CheckpointError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.sweep.work import SweepWorker, WorkerSlot


def make(folder):
    return IntactKVLM(str(folder), device="cpu", pivot="none")


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        make(folder)


def said(path, **more):
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(expression):
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
PUBLISHED = [
    CL100K, rf"[^\r\n\p{{L}}\p{{N}}]?{WORDS}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", r"\p{N}{1,3}",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+", r"[0-9][0-9][0-9]", r"\d{1,3}(?=(?:\d{3})*\b)", r"(?=(\d{3})+(?!\d))", r"\s+$",
    r"\s?\p{L}+", "[一-龥぀-ゟ゠-ヿ]+", " {2,}",
]  # fmt: skip
ENDLESS = [r"(a+)+$", r"(a|aa)+$", r"(\w+\s?)*$!", r"(x+x+)+y", r"([a-z]+)*=", r"(ab|a b|abab)*c", r"\w*\w*\w*\w*!",
           r"(\p{L}+\p{L}*)+\d"]  # fmt: skip


@pytest.mark.parametrize("expression", ENDLESS)
def test_an_expression_that_never_ends(saved_llama, expression):
    """The library panicked at the first text that it is slow on, or took hours for a page."""
    said(saved_llama / "tokenizer.json", pre_tokenizer=split(expression))
    begun = time.process_time()
    refused(saved_llama, "tokenizer.json has the regular expression .* takes more than 1 s or makes the tokenizers")
    assert time.process_time() - begun < 5


def test_wherever_the_expression_stands(saved_llama):
    path = saved_llama / "tokenizer.json"
    whole = path.read_text()
    bad, steps = ENDLESS[0], [split(PUBLISHED[0]), split(ENDLESS[0])]
    for section, value in (
        ("normalizer", replace({"Regex": bad}, "x")),
        ("decoder", {"type": "Sequence", "decoders": [replace({"Regex": bad}, "x")]}),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Sequence", "pretokenizers": steps}]}),
    ):
        said(path, **{section: value})
        refused(saved_llama, "tokenizer.json has the regular expression")
        path.write_text(whole)
    content = {key: value for key, value in json.loads(whole).items() if key != "pre_tokenizer"}
    path.write_text(f'{json.dumps(content)[:-1]}, "pre_tokenizer": {json.dumps(split(bad))}}}')  # behind the model
    refused(saved_llama, "tokenizer.json has the regular expression")


def test_published_expressions_are_read_at_once(saved_llama):
    """Of GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, DeepSeek, BLOOM, Falcon and others."""
    begun = time.perf_counter()
    assert endless_expression(tuple(PUBLISHED)) is None
    assert first_slow(KNOWN) is None
    assert {PUBLISHED[0], PUBLISHED[2]} <= KNOWN
    assert time.perf_counter() - begun < 2
    said(saved_llama / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [*map(split, PUBLISHED)]})
    assert make(saved_llama).tok_encode("abc 123")
    assert endless_expression(("(", "[z-a]", "a**")) is None, "the library itself says what is no expression"


def test_a_panic_at_a_text_is_one_message(saved_llama, tmp_path, monkeypatch, capsys):
    """Of an expression that is slow on the texts of a task alone; a panic is no Exception of Python."""
    said(saved_llama / "tokenizer.json", pre_tokenizer=split("q(a+)+$"))
    (tmp_path / "text.txt").write_text(f"q{'a' * 60}c " * 200)
    arguments = ["pivots", str(saved_llama), "--data", str(tmp_path / "text.txt"), "--samples", "2", "--length", "16"]
    monkeypatch.setattr("sys.argv", ["intactkv", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "intactkv: the model: the tokenizers library fails on its tokenizer.json, or on a text by it (Onig"
    )


def test_a_panic_in_a_sweep_is_the_error_of_its_cell(monkeypatch):
    class PanicException(BaseException):
        pass

    def evaluate(*_, **__):
        raise PanicException("boom")

    monkeypatch.setattr("intactkv_eval.sweep.work.evaluate_task", evaluate)
    monkeypatch.setattr(SweepWorker, "_prepare", lambda *_: None)
    unit = SimpleNamespace(begun=None, seed=None, arguments={"pretrained": "m"}, task=SimpleNamespace(
        task="t", metadata={}, num_fewshot=None, limit=None, gen_kwargs=None), preparations=())  # fmt: skip
    monkeypatch.setattr("intactkv_eval.sweep.work._settings", lambda *_: {})
    with pytest.raises(
        CheckpointError, match=r"pretrained='m': the tokenizers library fails on its tokenizer.json.*boom"
    ):
        SweepWorker(SimpleNamespace(share=False)).run(unit, WorkerSlot("cpu", Path()), Path())
