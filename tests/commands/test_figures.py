"""The numbers behind the figures are those of the model, and every figure is drawn from them alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.tiny import build_model
from typer.testing import CliRunner

from intactkv_eval.cell.spec import KVSpec, WeightSpec
from intactkv_eval.cli.main import app
from intactkv_eval.commands.figure_data import attention_maps, by_intact_rows, cache_rows, expected_outputs, outliers
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.pivot.capture import capture, fingerprint_of
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.report.plots import FIGURES, draw

PIVOT = (256, 7, 99)
TEXTS = [torch.arange(10, 30), torch.arange(60, 80)]
CELL = "dtype=float32,weights=rtn,bits=3,group_size=32,pivot=prompt,kv_bits=4"


@pytest.fixture(params=["llama", "mistral", "gemma3", "gpt2"])
def models(request):
    full = build_model(request.param)
    return (
        full,
        capture(full, PIVOT, fingerprint_of(full, "main")),
        quantize_model(full, WeightSpec(method="rtn", bits=3, group_size=32)),
    )


def test_nothing_is_lost_where_nothing_is_quantized(models):
    full, pivot, _ = models
    found = by_intact_rows(full, pivot, TEXTS, expected_outputs(full, pivot, TEXTS))
    assert found["loss_all"].shape == (4, 2)
    assert found["loss_all"].max() < 1e-9
    assert np.allclose(found["nll"], found["nll_full"], atol=1e-5)


@pytest.mark.parametrize("bits", [16, 3])
def test_each_size_is_the_model_with_so_many_intact_rows(models, bits):
    full, pivot, quantized = models
    whole, none = (PivotedModel(quantized, PIVOT, rows, KVSpec(bits=bits)) for rows in (pivot, None))
    expected = expected_outputs(full, pivot, TEXTS)
    found = by_intact_rows(quantized, pivot, TEXTS, expected, whole.kv_quantizer)
    for size, model in ((0, none), (3, whole)):
        for place, text in enumerate(TEXTS):
            scores = model.body_logits(text[None])[0].log_softmax(-1)
            expected = -float(scores[torch.arange(19), text[1:]].mean())
            assert found["nll"][size, place] == pytest.approx(expected, rel=1e-4)
    assert (found["loss_all"] >= found["loss_last"]).all()
    assert (found["loss_last"] > 0).all()


def test_attention_sums_to_one_and_outliers_are_outputs(models):
    full, *_ = models
    ids = [*PIVOT, *TEXTS[0].tolist()]
    maps = attention_maps(full, ids, (0, 2), None)
    assert maps.shape == (2, 23, 23)
    assert np.allclose(maps.sum(-1), 1, atol=1e-5)
    one = [attention_maps(full, ids, (0,), head) for head in range(4)]
    assert np.allclose(np.mean(one, axis=0)[0], maps[0], atol=1e-6)
    found = outliers(full, ids, 1)
    assert np.allclose(found["surface"].max(axis=1), found["magnitudes"][1], atol=1e-5)
    assert outliers(full, ids, None)["surface_layer"] in (0, 1, 2)


@pytest.mark.parametrize("intact", [True, False])
def test_cache_rows_are_quantized_but_for_the_intact_ones(intact):
    full = build_model("llama")
    pivot = capture(full, PIVOT, fingerprint_of(full, "main"))
    pivoted = PivotedModel(full, PIVOT, pivot if intact else None, KVSpec(bits=2))
    found = cache_rows(pivoted, TEXTS[0].tolist(), 1)
    for name in ("keys", "values"):
        before, after = found[name]
        assert before.shape == (23, 32)
        assert (np.abs(before - after)[:3].max() == 0) == intact
        assert np.abs(before - after)[3:].max() > 0.01
    assert np.allclose(found["keys"][0][:3], pivot.keys[1].transpose(0, 1).flatten(1).numpy(), atol=1e-5)


def run(*arguments):
    return CliRunner().invoke(app, ["figures", *map(str, arguments)])


def test_the_command_draws_every_figure_and_they_are_drawn_again_from_the_numbers(saved_llama, tmp_path):
    (tmp_path / "prose.txt").write_text("a few words that are here to be read, and then some more. " * 20)
    options = ["--data", tmp_path / "prose.txt", "--samples", 2, "--length", 24, "--formats", "png,pdf,svg"]
    out = tmp_path / "figures"
    result = run("--model_args", f"pretrained={saved_llama},{CELL}", "--out", out, *options)
    assert result.exit_code == 0, result.output
    names = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf", "svg")}
    assert {path.name for path in out.iterdir()} == names | {"figures.npz", "figures.json"}
    assert all((out / name).stat().st_size > 2000 for name in names)
    said = json.loads((out / "figures.json").read_text())
    assert "bits=3" in said["settings"]
    assert str(tmp_path) not in said["settings"]
    before = (out / "perplexity-by-size.svg").read_bytes()
    assert b"perplexity (a token)" in before
    draw(out, ("svg",))
    assert (out / "perplexity-by-size.svg").read_bytes() == before
    code = (
        "import sys, intactkv_eval.report.plots; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_maps_are_of_the_layers_that_they_are_called(saved_llama, tmp_path):
    """Typed in any order; they are computed in their own."""
    (tmp_path / "prose.txt").write_text("a few words that are here to be read, and then some more. " * 20)
    options = ["--data", tmp_path / "prose.txt", "--samples", 2, "--length", 24]
    cell = f"pretrained={saved_llama},dtype=float32,pivot=bos,kv_bits=4"
    maps = {}
    for layers in ("2,0,2", "0", "2"):
        out = tmp_path / layers.replace(",", "-")
        result = run("--model_args", cell, *options, "--out", out, "--layers", layers)
        assert result.exit_code == 0, result.output
        maps[layers] = np.load(out / "figures.npz")["attention"]
    assert json.loads((tmp_path / "2-0-2/figures.json").read_text())["layers"] == [0, 2]
    assert np.array_equal(maps["2,0,2"], np.concatenate([maps["0"], maps["2"]]))


@pytest.mark.parametrize(
    ("cell", "more", "said"),
    [
        ("pivot=none", [], "drop pivot=none"),
        ("pivot=bos", ["--layers", "0,9"], r"layers \[9\]"),
        ("pivot=bos,kv_bits=4,kv_scheme=channel_key", [], "drop kv_scheme"),
        ("pivot=bos", ["--layers", "x"], "write numbers"),
        ("pivot=bos", ["--head", "4"], "--head 4: this model has 4, 0 to 3"),
        ("pivot=bos", ["--formats", "gif"], "png, pdf, svg"),
    ],
)
def test_bad_input_is_named(saved_llama, tmp_path, cell, more, said):
    (tmp_path / "prose.txt").write_text("a few words that are here to be read, and then some more. " * 20)
    options = ["--data", tmp_path / "prose.txt", "--samples", 2, "--length", 24, "--out", tmp_path / "o", *more]
    result = run("--model_args", f"pretrained={saved_llama},dtype=float32,{cell}", *options)
    with pytest.raises(ConfigError, match=said):
        raise result.exception


def test_a_folder_without_numbers(tmp_path):
    with pytest.raises(ConfigError, match="run intactkv figures"):
        draw(tmp_path)
