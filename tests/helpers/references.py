"""What the tests of `reference=` share: small models, their folders, and checkpoints made of them."""

import torch
from helpers.tiny import BOS, EOS, PAD, uneven
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.lm.intactkv_lm import IntactKVLM

SHAPE = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": BOS, "eos_token_id": EOS,
    "pad_token_id": PAD, "initializer_range": 0.15,
}  # fmt: skip


def made(config, seed=0):
    torch.manual_seed(seed)
    return uneven(AutoModelForCausalLM.from_config(config).float().eval(), 0.1)


def saved(model, folder, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quantize(source, out, *options):
    done = CliRunner().invoke(
        app, ["quantize", str(source), "--out", str(out), "--group-size", "32", *map(str, options)]
    )
    assert done.exit_code == 0, done.output or done.exception
    return out


def load(checkpoint, reference, **more):
    options = {"pivot": "bos", "dtype": "float32", "device": "cpu", "batch_size": 2, **more}
    return IntactKVLM(str(checkpoint), reference=str(reference), **options)
