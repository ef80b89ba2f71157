"""Folders of models that would fill the memory, never end, or lead elsewhere: one message, before anything is allocated."""

import json
import os
import resource
import shutil
import time

import pytest
import torch
from helpers.tiny import build_model
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from intactkv_eval.commands.quantize import Source, quantize_to_folder
from intactkv_eval.compat import transformers_api
from intactkv_eval.errors import CheckpointError, IntactKVError
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.quantize.job import job_from
from intactkv_eval.storage.limits import TOKENIZER_GROWTH

SMALL = {"vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257}


def make(folder, **arguments):
    return IntactKVLM(str(folder), **{"batch_size": 2, "device": "cpu", "pivot": "none", **arguments})


def refused(folder, message, error=CheckpointError):
    """Within seconds, and without the memory that the files ask for."""
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(error, match=message):
        make(folder)
    assert time.process_time() - begun < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def said(path, **more):
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


@pytest.fixture
def saved(tmp_path, tokenizer):
    def save(model):
        model.save_pretrained(tmp_path / "m")
        tokenizer.save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    return save


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(**SMALL, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=4)
    )  # fmt: skip


def gpt2():
    return GPT2LMHeadModel(GPT2Config(**SMALL, n_positions=64, n_embd=32, n_layer=2, n_head=2))


def gpt_neo():
    kinds = [[["global", "local"], 1]]
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            **SMALL, hidden_size=64, num_layers=2, num_heads=2, attention_types=kinds, max_position_embeddings=64
        )
    )


def test_experts_and_positions_that_the_files_lack(saved):
    """They were allocated and filled with random numbers before anybody saw that they were missing."""
    folder = saved(mixtral())
    assert make(folder).model is not None
    said(folder / "config.json", num_local_experts=2**16, num_experts_per_tok=2)
    refused(folder, r"describes weights of 1\.5 GiB .the largest is .*experts")
    folder = saved(gpt2())
    said(folder / "config.json", n_positions=2**24)
    refused(
        folder, r"config.json describes weights of 2\.\d GiB .the largest is transformer.wpe.weight \[16777216, 32\]"
    )


def test_buffers_of_a_packed_checkpoint(saved, tmp_path):
    """GPT-Neo's causal mask has the square of its positions, and packed checkpoints are built with their buffers."""
    folder = saved(gpt_neo())
    job = job_from({"method": "rtn", "bits": 4, "group_size": 32, "symmetric": True}, [])
    quantize_to_folder(Source(str(folder)), tmp_path / "packed", "intactkv", job)
    assert make(tmp_path / "packed").model is not None
    said(tmp_path / "packed" / "config.json", max_position_embeddings=2**16)
    refused(tmp_path / "packed", r"describes buffers of \d+\.\d GiB")


def test_the_check_is_called_by_this_release():
    """It stands in a private function of transformers, which both supported ends have."""
    assert "_load_pretrained_model" in vars(transformers_api.PreTrainedModel)


def test_modules_without_an_end(saved, monkeypatch):
    monkeypatch.setattr("intactkv_eval.model.sizes.MODULES", 20)
    refused(saved(build_model("llama")), "describes a model of more than 20 modules")


def test_an_index_of_a_million_shards(saved_llama):
    tensors = load_file(saved_llama / "model.safetensors")
    (saved_llama / "model.safetensors").unlink()
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        table = {f"x{place}": f"s{place}.safetensors" for place in range(200_000)}
        (saved_llama / name).write_text(json.dumps({"metadata": {}, "weight_map": table}))
        refused(saved_llama, "names 200,000 files; expected at most 10,000 shards")
        (saved_llama / name).unlink()
    table = {key: f"part-{place}.safetensors" for place, key in enumerate(tensors)}
    for key, file in table.items():
        save_file({key: tensors[key]}, saved_llama / file, metadata={"format": "pt"})
    (saved_llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    assert make(saved_llama).model is not None


@pytest.mark.parametrize("named", ["../evil.safetensors.index.json", "/etc/passwd", "a/../../b", "..\\x", 5])
def test_weights_that_config_json_names(saved_llama, named):
    said(saved_llama / "config.json", transformers_weights=named)
    refused(saved_llama, "transformers_weights=.* is no file in the folder of the model")


def test_an_index_that_config_json_names(saved_llama):
    """Of any name: its shards lie in the folder too."""
    secret = saved_llama.parent / "secret.safetensors"
    shutil.move(saved_llama / "model.safetensors", secret)
    named = "own.safetensors.index.json"
    said(saved_llama / "config.json", transformers_weights=named)
    table = dict.fromkeys(load_file(secret), "../secret.safetensors")
    (saved_llama / named).write_text(json.dumps({"metadata": {}, "weight_map": table}))
    refused(saved_llama, "names '../secret.safetensors', which is outside the folder")


def test_a_folder_of_the_hubs_cache_is_made_of_links(saved_llama, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved_llama, blobs)
    for place, path in enumerate(sorted(blobs.iterdir())):
        path.rename(blobs / f"{place:x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{place:x}")
    tokens = torch.tensor([[256, 7, 9]])
    ours, plain = make(snapshot), make(saved_llama)
    assert torch.equal(ours.model(tokens).logits, plain.model(tokens).logits)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "added_tokens.json", "model.safetensors", "chat_template.jinja"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_file_that_never_ends(saved_llama, name, kind):
    (saved_llama / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(saved_llama / name)
    else:
        (saved_llama / name).symlink_to("/dev/zero")
    refused(saved_llama, f"{name}: is a {kind}, or a link to one")


def replace(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def template(count):
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*text, {"Sequence": {"id": "B", "type_id": 0}}]
    return {"type": "TemplateProcessing", "single": text * count, "pair": pair, "special_tokens": {}}


GROWING = {
    "a sequence": ("normalizer", {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 10)] * 20}),
    "sequences in sequences": ("normalizer", {"type": "Sequence", "normalizers": [
        {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 6}] * 5}),
    "one step": ("normalizer", replace({"String": "a"}, "b" * 10**6)),
    "what finds nothing": ("normalizer", {"type": "Sequence", "normalizers": [replace({"Regex": "x*"}, "bb")] * 9}),
    "what looks ahead": ("normalizer", {"type": "Sequence", "normalizers": [replace({"Regex": "(?=a)"}, "bb")] * 9}),
    "a decoder": ("decoder", {"type": "Sequence", "decoders": [replace({"String": "a"}, "a" * 10)] * 20}),
    "a template": ("post_processor", template(10**5)),
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_makes_texts_grow(saved_llama, name):
    """The library aborted the process, where its memory ended, at the first text."""
    section, steps = GROWING[name]
    said(saved_llama / "tokenizer.json", **{section: steps})
    refused(saved_llama, f"the {section} of tokenizer.json makes up to .* characters of one, .*at most 1,024")


def test_where_the_section_stands_is_no_matter(saved_llama):
    """Behind the model, under an escaped name, twice, or beside a number that Python does not read."""
    path = saved_llama / "tokenizer.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != "normalizer"}
    steps = json.dumps(GROWING["a sequence"][1])
    whole = json.dumps(content)[:-1]
    one = json.dumps(GROWING["one step"][1]).replace("Repl", "\\u0052epl")
    for text in (
        f'{whole}, "normalizer": {one}}}',
        f'{whole}, "normalizer": {steps}}}',
        f'{whole}, "norm\\u0061lizer": {steps.replace("Repl", chr(92) + "u0052epl")}}}',
        f'{{"normalizer": {steps}, {whole[1:]}}}',
        f'{{"a": {"9" * 5000}, "normalizer": {steps}, {whole[1:]}}}',
    ):
        path.write_text(text)
        refused(saved_llama, "the normalizer of tokenizer.json makes up to")


def test_other_tokenizers_that_never_end(saved_llama):
    path = saved_llama / "tokenizer.json"
    whole = path.read_text()
    long = {**template(1), "special_tokens": {"s": {"id": "s", "ids": [0] * 5000, "tokens": ["<s>"] * 5000}}}
    long["single"] = [{"SpecialToken": {"id": "s", "type_id": 0}}]
    for section, steps, message in (
        ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}, "puts 1,000,000 characters or tokens in front"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 300}, "more than 256 steps"),
        ("post_processor", long, "puts 5,000 characters or tokens in front"),
    ):
        said(path, **{section: steps})
        refused(saved_llama, message)
        path.write_text(whole)


def test_real_normalizers_are_read(saved_llama):
    """Of Llama, Gemma, T5, ALBERT, and with ids that end a vocabulary of a quarter of a million."""
    two = {"Regex": " {2,}"}
    for steps in (
        [{"type": "Prepend", "prepend": "\u2581"}, replace({"String": " "}, "\u2581")],
        [replace({"String": "``"}, '"'), replace({"String": "''"}, '"'), {"type": "NFKD"}, {"type": "StripAccents"},
         {"type": "Lowercase"}, replace(two, " ")],
        [{"type": "Strip", "strip_left": False, "strip_right": True}, replace(two, "\u2581")],
        [{"type": "NFC"}, *[replace({"Regex": f"[{one}]+"}, " ") for one in "\u00a0\u2000\u2001\u2002\u2003\u3000" * 4]],
    ):  # fmt: skip
        said(saved_llama / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
        assert make(saved_llama).tok_encode("abc")
    assert TOKENIZER_GROWTH >= 1000


def test_a_reference_is_looked_at_as_well(saved_llama, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(saved_llama, other)
    (other / "config.json").unlink()
    os.mkfifo(other / "config.json")
    with pytest.raises(IntactKVError, match="is a pipe"):
        make(saved_llama, pivot="bos", reference=str(other))


def test_a_tokenizer_on_which_the_library_fails(saved_llama):
    """A fault of a library in Rust is no Exception of Python: it ended in a traceback."""
    said(saved_llama / "tokenizer.json", normalizer=replace({"Regex": "x*"}, "aaaa"))
    refused(saved_llama, "the tokenizers library fails on its tokenizer.json")
