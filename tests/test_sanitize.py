"""What is shown, logged and recorded: no control characters, no credentials, no advice to trust a pickle."""

import io
import json
import logging
import subprocess
import sys

import pytest

from intactkv_eval.errors import ConfigError, IntactKVError
from intactkv_eval.sanitize import STRUCK, clean, clean_logs, is_secret_key, on_one_line, say, struck, struck_record

HF, SK = "hf_" + "aB3" * 11, "sk-proj-" + "a1B2c3D4" * 3
SECRETS = {
    "an argument": (f"pretrained=m,token={HF},dtype=float32", HF),
    "any token": ("pretrained=m,token=tokenwithoutaform", "tokenwithoutaform"),
    "a mapping": ("{'pretrained': 'm', 'token': 'abcdef123456'}", "abcdef123456"),
    "JSON": ('{"api_key": "abcdef123456"}', "abcdef123456"),
    "a header": ("Authorization: Bearer abcdef1234567890", "abcdef1234567890"),
    "basic": ("authorization: Basic YWxhZGRpbjpvcGVu", "YWxhZGRpbjpvcGVu"),
    "a word": ("password: hunter22", "hunter22"),
    "an address": ("http://user:pass@host:80/v1", "user:pass"),
    "an odd one": ("http://user:p#ss@host", "p#ss"),
    "a user alone": ("https://abcdef@host", "abcdef"),
    "hub": (f"the key {HF} is wrong", HF),
    "openai": (f"Incorrect API key provided: {SK}.", SK),
}
HARMLESS = [
    "kv_scheme=token_head, act_scheme=token, tokens=128, prefix_token_id=5, eos_token='</s>', max_tokens: 128",
    "special token: '<|endoftext|>', token=None, token=True, token=12345678, 'tokens': [1, 2]",
    "hf_arguments, hf_transfer, sk-learn, /models/task-sk-1, org/model@main, hf://datasets/org/name@main/a.json",
    "https://host/path?x=1#y, secret=false, a password that is missing, mail to a@b",
    "ein Grüßen, 日本語, 👩‍🔬, עברית",
]


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
def test_credentials_are_struck_out(text, secret):
    assert secret not in struck(text)
    assert STRUCK in struck(text)
    assert struck(struck(text)) == struck(text)
    assert secret not in str(ConfigError(text))
    assert secret not in json.dumps(struck_record({"a": [{"b": (text,)}]}))


@pytest.mark.parametrize("text", HARMLESS)
def test_other_words_are_left_as_they_are(text):
    assert clean(text) == text
    assert struck_record({"said": text}) == {"said": text}


def test_a_value_under_the_name_of_a_credential_is_struck_whatever_it_is():
    record = {"token": "x", "API-Key": "y", "tokens": [1], "hf_arguments": {"password": "z", "token": True}, "n": 1.5}
    assert struck_record(record) == {
        "token": STRUCK, "API-Key": STRUCK, "tokens": [1], "hf_arguments": {"password": STRUCK, "token": True}, "n": 1.5,
    }  # fmt: skip
    assert all(map(is_secret_key, ("token", "hf_token", "api_key", "apikey", "secret", "Authorization")))
    assert not any(map(is_secret_key, ("tokens", "eos_token", "tokenizer", "prefix_token_id", "kv_scheme")))


CONTROLS = {
    "colour": ("\x1b[31mred\x1b[0m", "red"),
    "C1 colour": ("\x9b31mred\x9b0m", "red"),
    "title": ("\x1b]0;owned\x07x", "0;ownedx"),
    "an open sequence hides nothing": ("name\x1b]: what came", "name: what came"),
    "cursor": ("a\x1b[2J\x1b[Hb\x1b7c", "abc"),
    "over the line": ("a\rb\r\nc", "a b c"),
    "C0": ("a\x00b\x07c\x08d\x7fe", "abcde"),
    "breaks": ("a\x0bb\x0cc\x85d\u2028e\u2029f", "a b c d e f"),
    "direction": ("a\u202eb\u2066c\u2069d\u200fe\u061cf", "abcdef"),
    "kept": ("a\tb\nc", "a\tb\nc"),
}


@pytest.mark.parametrize(("text", "left"), CONTROLS.values(), ids=CONTROLS)
def test_what_a_terminal_obeys_is_left_out(text, left, capsys):
    assert clean(text) == str(ConfigError(text)) == left
    assert on_one_line(text) == left.replace("\t", " ").replace("\n", " ")
    say(text)
    say(ConfigError(text), err=True)
    assert capsys.readouterr() == (f"{left}\n", f"{left}\n")


def test_a_name_that_is_no_unicode_can_be_said(capsys):
    say("a\udcffb")
    assert capsys.readouterr().out == "a\\udcffb\n"


def test_log_records_are_clean_whoever_writes_them():
    before, told = logging.getLogRecordFactory(), io.StringIO()
    handler = logging.StreamHandler(told)
    logger = logging.getLogger("somebody.elses")
    logger.addHandler(handler)
    try:
        clean_logs()
        factory = logging.getLogRecordFactory()
        clean_logs()
        assert logging.getLogRecordFactory() is factory, "twice is once"
        logger.error("arguments %s of %s", {"token": HF}, "\x1b[2Jm\u202e")
    finally:
        logging.setLogRecordFactory(before)
        logger.removeHandler(handler)
    assert told.getvalue() == f"arguments {{'token': '{STRUCK}'}} of m\n"


def test_nobody_is_told_to_trust_a_pickle(tmp_path):
    """transformers passes torch's message on: it tells how to load the file all the same."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from intactkv_eval.assemble.load_errors import loading

    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": ConfigError}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="weights_only"):  # the control: what transformers itself says
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(IntactKVError, match="a pickle that is damaged, or") as ended, loading("pretrained='m'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "weights_only" not in str(ended.value)


def test_a_message_of_the_command_is_clean(tmp_path):
    name = "x\x1b[31m\u202e.md"
    code = "import sys; from intactkv_eval.cli import main as cli; sys.argv[1:] = sys.argv[1:]; cli.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", str(tmp_path / name)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("intactkv: ")
    assert "x.md" in done.stderr
    assert "\x1b" not in done.stderr
