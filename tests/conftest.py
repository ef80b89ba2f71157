"""Fixtures: the small models of tiny.py, a real byte-level tokenizer, and the real SmolLM2."""

import logging
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from helpers.tiny import FAMILIES, build_model, byte_tokenizer


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    return build_model(request.param)


@pytest.fixture
def llama():
    return build_model("llama")


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


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


@pytest.fixture
def called(monkeypatch, capfd):
    """The command in this process: exit code and what it wrote to standard error."""
    from intactkv_eval.cli import main as cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["intactkv", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capfd.readouterr().err

    loggers = [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]
    before = {logger: list(logger.handlers) for logger in loggers}
    yield call
    for logger in [logging.getLogger(name) for name in (None, *logging.root.manager.loggerDict)]:
        logger.handlers = before.get(logger, [])  # one that writes where this test listened would be left over
