"""The small model and the works over it, for tests that run commands in processes of their own."""

import pytest
from helpers import works
from helpers.tiny import build_model, byte_tokenizer


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    build_model("llama").save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    return works.works(folder / "model", "http://127.0.0.1:9/v1", folder, [folder, folder])
