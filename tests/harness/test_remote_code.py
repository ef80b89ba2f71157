"""A model repository's own code runs where trust_remote_code=True was given, and then the results say so."""

import json

import pytest

from intactkv_eval.errors import IntactKVError
from intactkv_eval.harness.lm import IntactKVLM

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({ran!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = {kind!r}
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(params=["llama", "own_llama"])
def repository(saved_llama, tmp_path, request):
    """A model with code of its own, under a type that transformers knows or not; and the file that the code writes."""
    ran = tmp_path / "ran.txt"
    (saved_llama / "modeling_own.py").write_text(CODE.format(ran=str(ran), kind=request.param))
    config = json.loads((saved_llama / "config.json").read_text())
    config["model_type"] = request.param
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (saved_llama / "config.json").write_text(json.dumps(config))
    return saved_llama, ran, request.param == "llama"


def test_no_code_runs_unasked(repository):
    folder, ran, known = repository
    if known:
        IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu")
    else:
        with pytest.raises(IntactKVError, match="trust_remote_code"):
            IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu")
    assert not ran.exists()


def test_code_that_is_trusted_runs_and_is_recorded(repository):
    folder, ran, _ = repository
    lm = IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu", trust_remote_code=True)
    assert ran.exists()
    assert lm.get_model_info()["intactkv"]["hf_arguments"]["trust_remote_code"] == "True"
