"""What is read from strangers is a regular file of a bound size, by one module, whose table the page has."""

import ast
import json
import os
import time
from pathlib import Path

import pytest

from intactkv_eval.cell.config_files import load_config
from intactkv_eval.errors import CheckpointError, ConfigError, DataError, PivotError
from intactkv_eval.pivot.prefix_file import PrefixFile
from intactkv_eval.quantize.awq_search import load_search
from intactkv_eval.storage.documents import parse_json, parse_yaml
from intactkv_eval.storage.files import read_jsonl, read_text
from intactkv_eval.storage.limits import DOCUMENT_VALUES, READERS, read_bytes, table
from intactkv_eval.storage.tensor_file import read_metadata, read_tensor_file
from intactkv_eval.weights.checkpoint import Checkpoint, read_json

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "intactkv_eval"
# Modules that read other files themselves, and how often: what this package wrote or ships, or what they bound first.
OTHERS = {
    "storage/tensor_file.py": 2, "weights/checkpoint.py": 1, "quantize/awq_search.py": 1, "commands/outputs.py": 2,  # bound first
    "report/figure_numbers.py": 1,  # a part of an archive, as large as the part
    "mt_bench/questions.py": 1, "judge/references.py": 1, "judge/written.py": 1, "pivot/store.py": 1,  # were read before
    "lm/evaluate_task.py": 1, "sweep/identity.py": 1,  # its last byte; piece by piece
    "mt_bench/sources.py": 1, "quantize/layerwise.py": 2, "training/teacher.py": 1, "sweep/work.py": 1,  # ours
    "judge/journal.py": 1, "report/published.py": 1, "lm/plugin.py": 1, "storage/child_process.py": 1,  # ours, shipped, /proc
    "bench/report.py": 1,  # what it has just made
}  # fmt: skip


def test_the_page_has_the_limits_of_the_code():
    assert table() in (ROOT / "docs/reliability.md").read_text(), (
        "run scripts/limits_table.py --write docs/reliability.md"
    )
    for reader in READERS:
        for module in reader.module.split(", "):
            assert (PACKAGE / module).is_file()
            assert "intactkv_eval.storage.limits import" in (PACKAGE / module).read_text()


def test_every_other_reader_is_known():
    """Whoever adds one reads by limits.py, or says here why not."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [call.attr for call in calls if isinstance(call, ast.Attribute)]
        names += [call.id for call in calls if isinstance(call, ast.Name)]
        count = sum(name in {"safe_open", "read_text", "read_bytes"} for name in names)
        free = [call for call in calls if isinstance(call, ast.Attribute) and call.attr in {"read_bytes", "read_text"}]
        count = len(free) + names.count("safe_open") + sum(_reads(call) for call in _opens(path))
        if count and path.name != "limits.py":
            found[str(path.relative_to(PACKAGE))] = count
    assert found == OTHERS


def _opens(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            if name == "open" and owner not in {"os", "tarfile"}:
                yield node


def _reads(call):
    modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
    return not any(str(mode)[:1] in {"w"} for mode in modes) and "ab" not in modes


READ = {
    "results.json": (read_json, CheckpointError),
    "samples.jsonl": (read_jsonl, DataError),
    "text.txt": (read_text, DataError),
    "cell.yaml": (lambda path: load_config(str(path)), ConfigError),
    "pivot.safetensors": (read_tensor_file, CheckpointError),
    "levels.safetensors": (read_metadata, CheckpointError),
    "search.pt": (load_search, CheckpointError),
    "x.safetensors": (lambda path: Checkpoint(path.parent), CheckpointError),
    "choice.json": (PrefixFile.load, PivotError),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_an_endless_device_is_no_file(tmp_path, name, kind):
    """Readers waited for a writer that never comes, or read /dev/zero until the memory was full."""
    path, (read, error) = tmp_path / name, READ[name]
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    begun = time.monotonic()
    with pytest.raises(error, match=f"is a {kind}, or a link to one|does not exist"):
        read(path)
    assert time.monotonic() - begun < 2


def test_bytes_are_bound(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1025))
    with pytest.raises(ValueError, match="has 1,025 bytes; expected at most 1 KiB"):
        read_bytes(path, 1024)
    assert read_bytes(path, 1025) == bytes(1025)
    with pytest.raises(ValueError, match="is a folder"):
        read_bytes(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_bytes(tmp_path / "none")


def test_lines_are_bound(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": [1, 2, 3]}\n' * 4)
    assert len(read_jsonl(path)) == 4
    for name, most, message in (("DOCUMENT_BYTES", 8, "a line of more than 8 bytes"), ("LINES_VALUES", 15, "line 4: the file holds"),
                                ("LINES_BYTES", 32, "has 68 bytes; expected at most 32 bytes")):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(f"intactkv_eval.storage.files.{name}", most)
            with pytest.raises(DataError, match=message):
                read_jsonl(path)


def test_values_are_bound_and_texts_are_none():
    """Thirty megabytes of brackets become gigabytes of lists; as many within a text are a text."""
    many = "[" + "[]," * DOCUMENT_VALUES + "0]"
    with pytest.raises(ValueError, match="more than 10000000 values"):
        parse_json(many)
    assert parse_json(json.dumps({"a": many, "b": '\\"['})) == {"a": many, "b": '\\"['}
    begun = time.monotonic()
    with pytest.raises(json.JSONDecodeError, match="Unterminated string"):
        parse_json('["' + '\\",' * (DOCUMENT_VALUES + 1))  # a text that never ends, of escaped quotes
    assert time.monotonic() - begun < 60
    with pytest.raises(ValueError, match="a YAML of"):
        parse_yaml("a: 1\n" * 10**6)
