"""A model's folder and a response cache from elsewhere: one message, and no code of theirs runs."""

import hashlib
import json
import pickle
import sqlite3
from pathlib import Path

import pytest
import torch
from lm_eval.api.model import CachingLM, hash_args
from safetensors.torch import load_file, save_file
from sqlitedict import SqliteDict

from intactkv_eval.cell import formulas
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import CheckpointError, ConfigError, IntactKVError
from intactkv_eval.lm.intactkv_lm import IntactKVLM


def make(folder, **arguments):
    return IntactKVLM(str(folder), **{"batch_size": 2, "device": "cpu", **arguments})


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "num_attention_heads", 0),
        ("config.json", "num_hidden_layers", 10**300),
        ("config.json", "num_hidden_layers", 2**40),
        ("config.json", "hidden_size", "64"),
        ("config.json", "vocab_size", -5),
        ("config.json", "hidden_act", "foo"),
        ("config.json", "quantization_config", "gptq"),
        ("tokenizer.json", "model", {"type": "Other"}),
        ("tokenizer_config.json", "tokenizer_class", 5),
    ],
)
def test_a_damaged_folder_ends_in_one_message(saved_llama, name, key, value):
    content = json.loads((saved_llama / name).read_text())
    (saved_llama / name).write_text(json.dumps({**content, key: value}))
    with pytest.raises(IntactKVError, match="llama"):
        make(saved_llama)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_hidden_layers": 1001, "layer_types": ["full_attention"] * 1001}, "num_hidden_layers=1001; expected at most 1000"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window=None, and has layers of sliding_attention"),
        ({"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 2**70}, "sliding_window=1180591"),
        *(({"sliding_window": one}, "a whole number of 2 or more") for one in (0, -3, 1, 2.5, "4", [])),
    ],
)  # fmt: skip
def test_layers_that_no_model_has(saved_llama, said, message):
    """Refused before they are built: for minutes, or to fail at the first request."""
    content = json.loads((saved_llama / "config.json").read_text())
    (saved_llama / "config.json").write_text(json.dumps({**content, **said}))
    with pytest.raises(CheckpointError, match=message):
        make(saved_llama)


def test_token_ids_that_no_vocabulary_has(saved_llama):
    """The tokenizers library makes a table up to the highest: tens of gigabytes."""
    path = saved_llama / "tokenizer.json"
    content = json.loads(path.read_text())
    for damage in ("vocab", "added"):
        said = json.loads(json.dumps(content))
        (said["model"]["vocab"] if damage == "vocab" else said["added_tokens"][0])[
            "a" if damage == "vocab" else "id"
        ] = 2**31
        path.write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match="token id 2147483648; expected at most"):
            make(saved_llama)


def test_a_fault_of_ours_is_no_damaged_file(saved_llama, monkeypatch):
    def breaks(*_arguments, **_named):
        raise KeyError("ours")

    monkeypatch.setattr("intactkv_eval.lm.intactkv_lm.load_cell", breaks)
    with pytest.raises(KeyError, match="ours"):
        make(saved_llama)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "a stranger's code ran")


@pytest.mark.parametrize("key", ["intactkv_cell", "any request"])
def test_a_strangers_response_cache_runs_nothing(saved_llama, tmp_path, key):
    """lm_eval unpickles what it finds there."""
    database, trace = str(tmp_path / "cache.db"), tmp_path / "trace.txt"
    CachingLM(make(saved_llama), database).loglikelihood([make_request("loglikelihood", ("a", " b"), 0)])
    with SqliteDict(database, autocommit=True) as held:
        held[key] = Runs(trace)
    with pytest.raises(ConfigError, match="something that is no answer"):
        CachingLM(make(saved_llama), database)
    assert not trace.exists()


def test_a_response_cache_of_an_older_revision_is_refused(saved_llama, tmp_path, monkeypatch):
    """Neither one of another revision, nor one from before revisions were in a cell's identity."""
    database, cell = str(tmp_path / "cache.db"), {"kv_bits": 4}
    CachingLM(make(saved_llama, **cell), database)
    CachingLM(make(saved_llama, **cell), database)  # a control: the same revision goes on
    with monkeypatch.context() as changed:
        changed.setattr(formulas, "REVISIONS", {**formulas.REVISIONS, "kv.token_head": 1})
        with pytest.raises(ConfigError, match="older revision of a formula"):
            CachingLM(make(saved_llama, **cell), database)
    before = {key: value for key, value in make(saved_llama, **cell)._identity().items() if key != "formulas"}
    old = str(tmp_path / "old.db")
    with SqliteDict(old, tablename="unnamed", autocommit=True) as held:
        held["intactkv_cell"] = hashlib.sha256(json.dumps(before, sort_keys=True).encode()).hexdigest()
    with pytest.raises(ConfigError, match="older revision of a formula"):
        CachingLM(make(saved_llama, **cell), old)


def test_a_response_cache_cannot_bring_answers_in_later(saved_llama, tmp_path):
    """A trigger writes a pickle once the empty table has been looked through; so does another process."""
    database, trace = str(tmp_path / "cache.db"), tmp_path / "trace.txt"
    key, evil = hash_args("loglikelihood", ("a", " b")), pickle.dumps(Runs(trace))
    with sqlite3.connect(database) as file:
        file.execute('CREATE TABLE "unnamed" (key TEXT PRIMARY KEY, value BLOB)')
        file.execute(
            "CREATE TRIGGER late AFTER INSERT ON \"unnamed\" WHEN new.key = 'intactkv_cell' "
            f"BEGIN INSERT INTO \"unnamed\" VALUES ('{key}', X'{evil.hex()}'); END"
        )
    with pytest.raises(ConfigError, match="trigger late"):
        CachingLM(make(saved_llama), database)
    other = str(tmp_path / "other.db")
    lm = CachingLM(make(saved_llama), other)
    with SqliteDict(other, autocommit=True) as held:
        held[key] = Runs(trace)
    with pytest.raises(pickle.UnpicklingError, match="it names"):
        lm.loglikelihood([make_request("loglikelihood", ("a", " b"), 0)])
    assert not trace.exists()


@pytest.mark.parametrize(
    "schema",
    [
        ["CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB GENERATED ALWAYS AS (zeroblob(1000000000)))"],
        ["CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB CHECK (length(hex(randomblob(200000000))) > 0))"],
        [
            "CREATE TABLE unnamed (key TEXT PRIMARY KEY, value BLOB)",
            "CREATE INDEX late ON unnamed (length(zeroblob(900000000)))",
        ],
    ],
    ids=["a value of 1 GB", "a check", "an index"],
)
def test_a_response_cache_is_a_plain_table(saved_llama, tmp_path, schema):
    """A computed column gives a value of a gigabyte for each row of a small file."""
    database = str(tmp_path / "cache.db")
    with sqlite3.connect(database) as file:
        for text in schema:
            file.execute(text)
    with pytest.raises(ConfigError, match="which acts when the file is used"):
        CachingLM(make(saved_llama), database)


def test_an_answer_that_holds_itself_many_times(saved_llama, tmp_path):
    """Written to the samples, a few bytes became more than any disk holds."""
    database, value = str(tmp_path / "cache.db"), ("x",)
    CachingLM(make(saved_llama), database)
    for _ in range(60):
        value = (value, value)
    with SqliteDict(database, autocommit=True) as held:
        held["a"] = value
        held["b"] = {"k": (1.0, True)}
    with pytest.raises(ConfigError, match="holds more than 10000000 parts"):
        CachingLM(make(saved_llama), database)


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("shard", ["../secret.safetensors", "deep/../../secret.safetensors", "/secret.safetensors"])
def test_an_index_cannot_lead_out_of_a_full_precision_model(saved_llama, index, shard):
    weights = saved_llama / "model.safetensors"
    names = load_file(weights)
    weights.rename(saved_llama.parent / "secret.safetensors")
    (saved_llama / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(CheckpointError, match="outside the folder"):
        make(saved_llama)


def test_a_checkpoint_with_a_missing_tensor_is_refused(saved_llama):
    """transformers fills it with random numbers and goes on."""
    file = saved_llama / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        make(saved_llama)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(IntactKVError, match="shape"):
        make(saved_llama)


def test_a_truncated_checkpoint(saved_llama):
    weights = saved_llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="damaged"):
        make(saved_llama)
