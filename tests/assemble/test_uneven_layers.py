"""Layers with heads and widths of their own, and last layers that attend to what earlier ones cache (Gemma 3n, 4)."""

import json

import pytest
import torch
import transformers
from helpers.tiny import _SHAPE, uneven
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.inference.batch_size import bytes_per_row, kv_bytes_per_token
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.structure import cache_devices
from intactkv_eval.pivot.kv import PivotKV

KINDS = ["sliding_attention", "sliding_attention", "full_attention"]
OWN_KEYS = {"head_dim": 16, "sliding_window": 8, "layer_types": KINDS, "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0, "global_head_dim": 32}  # fmt: skip
BORROWED = {**OWN_KEYS, "num_hidden_layers": 6, "layer_types": KINDS * 2, "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 259, "num_kv_shared_layers": 3}  # fmt: skip
MODELS = {
    "gemma4": ("Gemma4TextConfig", OWN_KEYS),
    "gemma4_k_eq_v": ("Gemma4TextConfig", {**OWN_KEYS, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    "gemma4_e2b": ("Gemma4TextConfig", BORROWED),
    "gemma3n": ("Gemma3nTextConfig", {
        **{key: value for key, value in BORROWED.items() if key != "global_head_dim"}, "laurel_rank": 8,
        "altup_num_inputs": 2, "intermediate_size": [96] * 6, "activation_sparsity_pattern": [0.0] * 6,
    }),
}  # fmt: skip
PAIRS = [("The quick brown fox jumps over", " the lazy dog"), ("The quick brown fox jumps over", " a cat"),
         ("The quick brown", " dog"), ("Short", " one")]  # fmt: skip


def build(name):
    config, more = MODELS[name]
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {config}")
    torch.manual_seed(0)
    return uneven(AutoModelForCausalLM.from_config(getattr(transformers, config)(**{**_SHAPE, **more})).eval(), 0.1)


@torch.no_grad()
def plain(model, tokenizer, pairs):
    """Log-likelihoods by transformers, a text at a time."""
    found = []
    for context, continuation in pairs:
        whole = torch.tensor([[256, *tokenizer.encode(context + continuation)]])
        logits = model(whole).logits[0].double().log_softmax(-1)
        count = len(tokenizer.encode(continuation))
        found.append(float(logits[:-1].gather(1, whole[0, 1:, None])[-count:].sum()))
    return found


CELLS = [
    {"pivot": "none", "batch_size": "auto"}, {"pivot": "none", "batch_size": 2, "share_prefix": False},
    {"pivot": "bos", "batch_size": "auto"}, {"pivot": "bos", "batch_size": 3, "share_prefix": False},
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELS))
def test_they_compute_what_transformers_does(tokenizer, name):
    model = build(name)
    expected = plain(model, tokenizer, PAIRS)
    prompts = ["The quick brown fox jumps over", "Hi"]
    texts = []
    for prompt in prompts:
        ids = torch.tensor([[256, *tokenizer.encode(prompt)]])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    for cell in CELLS:
        lm = IntactKVLM(pretrained=model, tokenizer=tokenizer, add_bos_token=None, **cell)
        found = lm.loglikelihood([make_request("loglikelihood", pair) for pair in PAIRS], disable_tqdm=True)
        assert [one for one, _ in found] == pytest.approx(expected, abs=1e-4), cell
        options = {"until": [], "do_sample": False, "max_gen_toks": 8}
        requests = [make_request("generate_until", (prompt, dict(options))) for prompt in prompts]
        assert lm.generate_until(requests, disable_tqdm=True) == texts, cell


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_bytes_of_a_token_are_counted_layer_by_layer(name):
    model = build(name)
    caching = len(cache_devices(model))
    assert caching == 3, "layers that attend to another's keys cache none"
    widths = [16, 16, 16 if name == "gemma3n" else 32]
    heads = [2, 2, 1 if name == "gemma4_k_eq_v" else 2]
    assert kv_bytes_per_token(model) == sum(4 * 2 * one * width for one, width in zip(heads, widths, strict=True))
    assert bytes_per_row(model, 8) > bytes_per_row(model, 8, all_logits=False) > 8 * kv_bytes_per_token(model)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_k_eq_v"])
def test_own_checkpoints_are_compared_with_their_reference(tokenizer, tmp_path, name):
    build(name).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    options = ["--out", tmp_path / "packed", "--method", "rtn", "--bits", 8, "--group-size", 32, "--dtype", "float32",
               "--format", "compressed-tensors"]  # fmt: skip
    assert CliRunner().invoke(app, ["quantize", str(tmp_path / "full"), *map(str, options)]).exit_code == 0
    packed = {"reference": str(tmp_path / "full"), "dtype": "float32", "device": "cpu"}
    lm = IntactKVLM(str(tmp_path / "packed"), **packed)
    own = IntactKVLM(str(tmp_path / "full"), weights="rtn", bits=8, group_size=32, dtype="float32", device="cpu")
    requests = [make_request("loglikelihood", pair) for pair in PAIRS]
    one, other = (each.loglikelihood(requests, disable_tqdm=True) for each in (lm, own))
    assert [x for x, _ in one] == pytest.approx([x for x, _ in other], rel=5e-3)


@pytest.mark.parametrize("name", ["gemma4_e2b", "gemma3n"])
def test_rows_that_act_in_several_layers_are_trained_whole(tokenizer, tmp_path, name):
    """Layer by layer, what borrowed keys do to later layers would be in no gradient."""
    model = build(name)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    rows = [[("user", f"say {n}"), ("assistant", f"well, {n} it is")] for n in range(6)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    options = ["--model_args", f"pretrained={tmp_path / 'full'},dtype=float32,act_bits=8,pivot=bos", "--data",
               tmp_path / "talks.jsonl", "--out", tmp_path / "p.safetensors", "--epochs", 1, "--batch-size", 4,
               "--min-assistant-tokens", 3, "--max-tokens", 60]  # fmt: skip
    refused = CliRunner().invoke(app, ["calibrate", *map(str, options)])
    assert isinstance(refused.exception, UnsupportedModelError), refused.exception
    assert "last 3 of its 6 decoder layers" in str(refused.exception)
    whole = CliRunner().invoke(app, ["calibrate", *map(str, options), "--no-recompute"])
    if name == "gemma3n":
        assert "several hidden states of a token" in str(whole.exception)
        return
    assert whole.exit_code == 0, (whole.output, whole.exception)
    assert PivotKV.load(tmp_path / "p.safetensors").fingerprint.calibrated is not None
