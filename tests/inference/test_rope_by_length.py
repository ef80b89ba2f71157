"""Models whose RoPE frequencies depend on the length: the numbers of plain transformers, one text at a time."""

import pytest
import torch
from helpers.kv_cells import pivoted, spec
from helpers.rope_models import (
    BORDER,
    DYNAMIC,
    FRONT,
    LONG,
    LONGROPE,
    MODELS,
    PAIRS,
    TEXT,
    build,
    hf,
    ours,
    scores,
)
from helpers.tiny import _SHAPE, BOS, FAMILIES, byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
)
from typer.testing import CliRunner

from intactkv_eval.cell.spec import KVSpec, WeightSpec
from intactkv_eval.cli.main import app
from intactkv_eval.commands.calibrate import _check_frequencies
from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.rope_length import first_position_is_same, rope_by_length
from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel
from intactkv_eval.inference.scoring.request_table import Request
from intactkv_eval.inference.scoring.score import score
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.block_walk import BlockWalk
from intactkv_eval.quantize.on_the_fly import quantize_model


@pytest.mark.parametrize("pivot", ["none", "bos"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_log_likelihoods_are_those_of_hf_at_batch_size_one(name, share, pivot):
    lm = ours(name, pivot=pivot, share_prefix=share, batch_size=4)
    torch.testing.assert_close(scores(lm, PAIRS), scores(hf(name), PAIRS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", LONG)
def test_a_text_alone_has_the_number_that_it_has_beside_others(name):
    lm = ours(name, pivot="bos", batch_size=4)
    together = scores(lm, PAIRS)
    torch.testing.assert_close(
        torch.cat([scores(lm, [pair]) for pair in PAIRS[::-1]]).flip(0), together, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("intact", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_pivot_of_several_tokens_in_full_precision_is_the_plain_model(name, intact):
    """Law 1 on both sides of the border."""
    lm, plain = ours(name, pivot="tokens:256+10+20+30", intact=intact, batch_size=4), hf(name)
    front = plain.tokenizer.decode(FRONT[1:])
    expected = scores(plain, [(front + context, answer) for context, answer in PAIRS])
    torch.testing.assert_close(scores(lm, PAIRS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("intact", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_row_that_begins_with_the_pivot(name, intact):
    """T tokens in, T rows out: those of the pivot's own tokens are of this length too."""
    model, row = build(name), torch.tensor([[*FRONT, *range(50, 50 + BORDER)]])
    pivot = capture(model, FRONT, fingerprint_of(model, "main")) if intact else None
    made = PivotedModel(
        model, FRONT, pivot, in_long_texts=PivotedModel(model, FRONT, None) if name == "dynamic" else None
    )
    with torch.no_grad():
        expected = build(name)(row).logits
    torch.testing.assert_close(made.logits(row), expected, rtol=0, atol=1e-4)


def test_a_pivot_that_is_quantized_before_rope_is_so_with_the_frequencies_of_long_texts():
    """The first layer's rows are those that the model quantizes when it computes the same tokens."""
    kv = spec("pre_rope", quantize_pivot=True)
    made = pivoted(build("phi3"), FRONT, True, kv)
    computing = PivotedModel(made.model, FRONT, None, kv, made.codebook)
    cache = computing.new_cache(1)
    run_with_cache(made.model, cache, torch.tensor([[*FRONT, *range(50, 50 + BORDER)]]))
    found = made.for_length(BORDER + 4).front_rows.keys[0]
    torch.testing.assert_close(found, cache.layers[0].keys[0, :, :4], rtol=0, atol=1e-5)


@pytest.mark.parametrize("front", [(BOS,), FRONT])
@pytest.mark.parametrize("length", [12, BORDER + 8])
@pytest.mark.parametrize("name", LONG)
def test_a_quantized_model_gets_the_rows_of_texts_of_this_length(name, front, length):
    """The oracle is transformers' cache: the full-precision model's over the same text, cut behind the pivot."""
    full = build(name)
    if name == "phimoe":  # its experts are no linear layers
        quantized = build(name)
        with torch.no_grad():
            for part in quantized.parameters():
                part.copy_((part * 16).round() / 16)
    else:
        quantized = quantize_model(full, WeightSpec(method="rtn", bits=3, group_size=32))
    body = torch.arange(10, 10 + length)[None]
    cache = DynamicCache(config=full.config)
    with torch.no_grad():
        full(torch.cat([torch.tensor([front]), body], 1), **cache_argument(full, cache))
        cache.crop(-length)
        expected = quantized(body, **cache_argument(quantized, cache)).logits
    pivot = capture(full, front, fingerprint_of(full, "main"))
    found = PivotedModel(quantized, front, pivot).body_logits(body)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
    if len(front) > 1 and length > BORDER:
        pivot = capture(full, front, fingerprint_of(full, "main"))
        object.__setattr__(pivot, "long", None)
        with pytest.raises(PivotError, match=f"texts of up to {BORDER} tokens"):
            PivotedModel(quantized, front, pivot).body_logits(body)


def test_both_sets_of_rows_are_in_the_file(tmp_path):
    model = build("phi3")
    pivot = capture(model, FRONT, fingerprint_of(model, "main"))
    pivot.save(tmp_path / "pivot.safetensors")
    again = PivotKV.load(tmp_path / "pivot.safetensors")
    assert all(torch.equal(one, other) for one, other in zip(again.long.keys, pivot.long.keys, strict=True))
    assert not torch.allclose(pivot.long.keys[0], pivot.keys[0], atol=1e-2)
    with pytest.raises(PivotError, match="not shaped"):
        PivotKV(FRONT, pivot.keys, pivot.values, pivot.logits, pivot.fingerprint, long=pivot.long._replace(keys=()))


@pytest.mark.parametrize(
    "kv", [KVSpec(bits=4), spec("pre_rope"), spec("pre_rope", quantize_pivot=True), spec("channel_key")]
)
def test_rows_together_with_a_quantized_cache_are_those_of_rows_alone(kv):
    """In fp64: another order of summation would put a number on the other side of a step."""
    made = pivoted(build("phi3").double(), FRONT, True, kv)
    draw = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(0, 256, (length,), generator=draw).tolist() for length in (5, BORDER - 8, BORDER, BORDER + 30)
    ]
    found = score(SharedModel(made), [Request(row[:-4], row[-4:]) for row in rows], lambda tokens: 8, torch.float64)
    exact = PivotedModel(made.model, FRONT, made.pivot)
    for row, one in zip(rows, found, strict=True):
        sums = []
        for model in (made, exact):
            logits = model.body_logits(torch.tensor([row[:-1]]))[0, -4:].log_softmax(-1)
            sums.append(float(logits.gather(1, torch.tensor([row[-4:]]).T).sum()))
        assert abs(one.log_likelihood - sums[0]) < 1e-8
        if len(row) > 8:  # short ones lie in what channel_key keeps in full
            assert 1e-6 < abs(sums[0] - sums[1]) < 12, "quantized, with the frequencies of this length"


def test_a_short_text_behind_a_longer_one_has_the_frequencies_of_short_texts():
    """With dynamic NTK, of which some releases of transformers keep the long text's for good."""
    model = AutoModelForCausalLM.from_config(DYNAMIC()).eval()
    short, long = torch.arange(BORDER)[None], torch.arange(BORDER + 30)[None]
    with torch.no_grad():
        expected = model(short).logits
        model(long)
        torch.testing.assert_close(PivotedModel(model, (), None).body_logits(short), expected)


def test_borders_of_configs():
    """Of longrope and of dynamic NTK, of several kinds of layers, and of models of one set of frequencies."""
    borders = [rope_by_length(make()) for make in (MODELS["phi3"], DYNAMIC)]
    assert [(one.border, one.grows) for one in borders] == [(BORDER, False), (BORDER, True)]
    yarn = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    kinds = {"rope_type": "default", "rope_theta": 1e4}
    for config in (LlamaConfig(**_SHAPE), LlamaConfig(**_SHAPE, rope_parameters=yarn), FAMILIES["gemma3"]()):
        assert rope_by_length(config).border is None
    gemma = FAMILIES["gemma3"]()
    gemma.rope_parameters = {"sliding_attention": kinds, "full_attention": LONGROPE}
    assert rope_by_length(gemma).border == BORDER


@pytest.mark.parametrize(("name", "same"), [("phi3", True), ("phimoe", False)])
def test_a_key_at_the_first_position(name, same):
    """PhiMoE's have another scale beyond the border."""
    if name not in MODELS:
        pytest.skip("this release of transformers has no long frequencies for PhiMoE")
    assert first_position_is_same(build(name)) is same


@pytest.mark.parametrize("length", [24, BORDER])
def test_samples_of_a_calibration_stand_behind_rows_of_their_frequencies(length, tmp_path, monkeypatch):
    seen = []

    class Watched(BlockWalk):
        def __init__(self, model, samples, pivot=None, *others):
            seen.append(pivot)
            super().__init__(model, samples, pivot, *others)

    monkeypatch.setattr("intactkv_eval.commands.quantize.BlockWalk", Watched)
    model, text = build("phi3"), tmp_path / "text.txt"
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    text.write_text(TEXT * 20)
    options = [
        "--method",
        "gptq",
        "--bits",
        "4",
        "--group-size",
        "32",
        "--dtype",
        "float32",
        "--pivot",
        "tokens:256+10",
    ]
    options += ["--data", str(text), "--samples", "2", "--length", str(length)]
    result = CliRunner().invoke(app, ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    expected = capture(model, (BOS, 10), fingerprint_of(model, "main"))
    expected = expected.in_long_texts() if length == BORDER else expected
    torch.testing.assert_close(seen[0].keys[1], expected.keys[1])


def test_conversations_on_both_sides_of_the_border_train_no_rows():
    made = PivotedModel(build("phi3"), FRONT, None)
    _check_frequencies(made, BORDER - 4)
    with pytest.raises(ConfigError, match=f"--max-tokens {BORDER - 4}"):
        _check_frequencies(made, BORDER - 3)


def test_the_record_names_the_border():
    assert ours("phi3", pivot="none").cell_record()["rope_by_length"] == {"border": BORDER, "grows": False}
