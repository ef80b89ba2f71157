"""Fixtures: the small models of tiny.py, a real byte-level tokenizer, and the real SmolLM2."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from tiny import BOS, EOS, FAMILIES, PAD, build_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return build_model(request.param)


@pytest.fixture
def llama():
    return build_model("llama")


CHAT_TEMPLATE = (
    "{{ bos_token }}Be kind.\n{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    made.chat_template = CHAT_TEMPLATE
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (BOS, EOS, PAD)
    return made


@pytest.fixture
def saved_llama(llama, tokenizer, tmp_path):
    """A folder as from_pretrained reads it."""
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Captured pivots of one test are not seen by another, nor left in the user's home."""
    monkeypatch.setenv("INTACTKV_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real SmolLM2-135M-Instruct, dequantized from the demo's wheel; kept between runs."""
    from intactkv_eval.demo import prepare_model

    return prepare_model(Path.home() / ".cache" / "intactkv" / "demo")


@pytest.fixture(scope="session")
def shared_hub():
    hub = Path(__file__).resolve().parents[2] / "shared" / "hub"
    if not hub.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return hub
