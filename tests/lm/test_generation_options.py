"""--gen_kwargs and a task's generation_kwargs: what `generate` refuses is one message, before a model is loaded."""

import subprocess
import sys

import pytest

from intactkv_eval.commands import evaluate
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.generation_options import check_options, for_generate
from intactkv_eval.lm.harness_flags import errors_in_one_message
from intactkv_eval.lm.intactkv_lm import IntactKVLM

BAD = {
    "foo=1": "unknown argument 'foo': known are .*until",
    "stop=e": "unknown argument 'stop': did you mean 'until'",
    "max_gen_tok=3": "unknown argument 'max_gen_tok': did you mean 'max_gen_toks'",
    "assistant_model=x": "unknown argument 'assistant_model'",
    "max_gen_toks=0": "max_gen_toks=0: expected a whole number from 1",
    "temperature=-1,do_sample=True": "temperature=-1.0: expected a number from 0",
    "temperature=0,do_sample=True": "sampling needs a temperature above 0",
    "do_sample=yes": "do_sample='yes': expected true or false",
    "num_beams=2.5": "num_beams=2.5: expected a whole number from 1",
    "top_p=1.5": "top_p=1.5: expected a number from 0 to 1",
    "until=5": "until=5: expected a text",
    "eos_token_id=x": "eos_token_id='x': expected a token id",
    "suppress_tokens=5": "suppress_tokens=5: expected a list of token ids",
    "cache_implementation=static": "cache_implementation='static'.*does nothing here",
    "use_cache=False": "use_cache=False: lm_eval's hf always",
    "pad_token_id=3": "pad_token_id=3",
    "num_return_sequences=2,num_beams=2": "num_return_sequences=2",
    "stop_strings=x": "lm_eval names stop strings by until",
    "early_stopping=soon": "refuses.*early_stopping",
    "penalty_alpha=0.6": "contrastive",
}  # fmt: skip


@pytest.mark.parametrize(("given", "message"), BAD.items(), ids=BAD)
def test_a_command_ends_before_the_model_is_looked_for(monkeypatch, given, message):
    monkeypatch.setattr(evaluate, "check_tasks", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["lm_eval"])
    arguments = ["--model_args", "pretrained=/nowhere", "--tasks", "x", "--gen_kwargs", given]
    with pytest.raises(ConfigError, match=f"--gen_kwargs: .*{message}"):
        evaluate.run_lm_eval(arguments)


GOOD = [
    {"until": ["\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0},
    {"max_tokens": 5, "until": "x", "do_sample": True, "temperature": 1, "top_p": 0.9, "top_k": 0, "min_p": 0.1},
    {"num_beams": 4, "length_penalty": -1, "early_stopping": "never"},
    {"eos_token_id": [1, 2], "suppress_tokens": [5], "max_length": 100, "min_length": 5},
    {"cache_implementation": None, "num_beams": None, "dola_layers": None},
    {"watermarking_config": {"bias": 2.0}, "repetition_penalty": 2},
]


@pytest.mark.parametrize("options", GOOD, ids=str)
def test_what_generate_takes_is_taken(options):
    check_options(options)


def test_whole_numbers_are_made_floats_where_transformers_takes_no_others(saved_llama):
    assert for_generate({"temperature": 2, "num_beams": 2, "top_p": None}) == {
        "temperature": 2.0, "num_beams": 2, "top_p": None}  # fmt: skip
    lm = IntactKVLM(pretrained=str(saved_llama), pivot="bos", batch_size=2)
    asked = [
        make_request("generate_until", ("a", {"until": [], "max_gen_toks": 3, "repetition_penalty": 2}), 0, task="t")
    ]
    assert len(lm.generate_until(asked, disable_tqdm=True)) == 1


def test_a_task_of_whom_one_option_is_wrong_is_named_before_anything_is_generated(saved_llama, monkeypatch):
    lm = IntactKVLM(pretrained=str(saved_llama), pivot="bos", batch_size=2)
    monkeypatch.setattr(lm.model, "generate", None)
    options = {"until": [], "max_gen_toks": 3}
    asked = [
        make_request("generate_until", ("a", options), 0, task="right"),
        make_request("generate_until", ("a", {**options, "stop": "e"}), 1, task="wrong"),
    ]
    with pytest.raises(ConfigError, match="generation_kwargs of task wrong: unknown argument 'stop'"):
        lm.generate_until(asked, disable_tqdm=True)


def test_an_error_of_the_user_is_one_message_and_exit_code_2(monkeypatch, capsys):
    others = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: others.append(error))
    errors_in_one_message()
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(ConfigError, ConfigError("no such key"), None)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "intactkv: no such key\n"
    sys.excepthook(ValueError, ValueError("ours"), None)
    assert len(others) == 1


@pytest.mark.slow
def test_lm_evals_own_command_ends_in_one_message_too(tmp_path):
    """Run as lm_eval's program is: by a file of its name."""
    program = tmp_path / "lm_eval"
    program.write_text(
        "import intactkv_eval.lm.intactkv_lm as lm\n"
        "lm.IntactKVLM.create_from_arg_obj({'pretrained': '/nowhere'}, {'batch_size': 1})\n"
    )
    arguments = ["run", "--model", "intactkv", "--tasks", "x", "--gen_kwargs", "foo=1"]
    ended = subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("intactkv: --gen_kwargs: unknown argument 'foo'")
    assert "Traceback" not in ended.stderr
