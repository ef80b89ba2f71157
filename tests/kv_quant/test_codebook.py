"""Levels of pre_rope: k-means, ranges, what counts, the file, the command, and whose levels they are."""

import json

import numpy as np
import pytest
import torch
from helpers.kv_cells import levels_of, samples
from helpers.tiny import BOS, build_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.commands.kv_codebook import CodebookOptions, codebook_of_text
from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.errors import CheckpointError, ConfigError, DataError
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.kv_quant.codebook_calibration import BINS, calibrate_codebook, k_means
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.capture import fingerprint_of


def best_error(numbers, levels):
    """The least squared error of any `levels` centres for sorted numbers, by dynamic programming."""
    sums, squares = np.r_[0, np.cumsum(numbers)], np.r_[0, np.cumsum(numbers**2)]
    start, end = np.arange(len(numbers))[:, None], np.arange(1, len(numbers) + 1)[None]
    cost = squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / np.maximum(end - start, 1)
    cost = np.where(end > start, cost, np.inf)
    best = cost[0]
    for _ in range(levels - 1):
        best = np.min(np.r_[np.inf, best[:-1]][:, None] + cost, axis=0)
    return best[-1]


@pytest.mark.parametrize("shape", ["normal", "heavy tails", "ends"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_k_means_is_near_the_best(shape, bits):
    draw = np.random.default_rng(0)
    made = {"normal": draw.normal(0, 0.25, 400), "heavy tails": 0.05 * draw.standard_t(2, 400), "ends": draw.uniform(-1, 1, 400)}[shape]  # fmt: skip
    numbers = np.sort(np.clip(made, -1, 1))
    if shape == "ends":
        numbers[:60], numbers[-60:] = -1, 1
    centres = k_means(torch.histc(torch.tensor(numbers), BINS, -1, 1), 2**bits).double().numpy()
    assert (np.diff(centres) >= 0).all()
    error = (np.abs(numbers[:, None] - centres).min(axis=1) ** 2).sum()
    even = np.linspace(-1, 1, 2**bits)
    assert error <= 1.01 * best_error(numbers, 2**bits)
    assert error < (np.abs(numbers[:, None] - even).min(axis=1) ** 2).sum()


def test_k_means_of_many_numbers():
    """More filled bins than cells of the first split: still near the best of an even sample."""
    numbers = np.sort(np.clip(np.random.default_rng(1).normal(0, 0.25, 10**6), -1, 1))
    centres = k_means(torch.histc(torch.tensor(numbers), BINS, -1, 1), 8).double().numpy()
    sample = numbers[::1500]
    error = (np.abs(sample[:, None] - centres).min(axis=1) ** 2).sum()
    assert error <= 1.02 * best_error(sample, 8)


def test_few_numbers_keep_their_places():
    counts = torch.zeros(BINS)
    counts[[0, BINS // 2, BINS - 1]] = torch.tensor([5.0, 1.0, 9.0])
    assert k_means(counts, 4)[[0, -1]].tolist() == pytest.approx([-1, 1], abs=1e-3)
    assert len(k_means(torch.zeros(BINS), 4)) == 4


@pytest.mark.parametrize("left_out", [0, 1, 3])
def test_ranges_are_those_of_the_rows_that_count(left_out):
    """GPT-2 has no RoPE: its cached keys are what is ranged."""
    model = build_model("gpt2")
    texts = samples(2, 30)
    levels = calibrate_codebook(model, texts, 3, fingerprint_of(model, "main"), (BOS,), left_out)
    keys = []
    for text in texts:
        with torch.no_grad():
            run_with_cache(model, cache := CountingCache(), torch.cat([torch.tensor([BOS]), text])[None])
        keys.append(cache.layers[1].keys[0, :, left_out:])
    both = torch.cat(keys, dim=1)
    torch.testing.assert_close(levels.low[1], both.amin(dim=1))
    torch.testing.assert_close(levels.high[1], both.amax(dim=1))
    scaled = 2 * (both - both.amin(1, True)) / (both.amax(1, True) - both.amin(1, True)) - 1
    whole = k_means(torch.histc(scaled, BINS, -1, 1).double(), 8)
    torch.testing.assert_close(levels.key_levels[1], whole, rtol=0, atol=1e-3)
    assert levels.calibration.tokens == 60


def test_samples_are_taken_once_and_may_be_a_generator(llama):
    made = calibrate_codebook(llama, (text for text in samples()), 3, fingerprint_of(llama, "main"), (BOS,), 1)
    assert made.digest == levels_of(llama, (BOS,), 1).digest
    assert made.digest != levels_of(llama, (BOS,), 0).digest


def test_bad_samples(llama):
    mark = fingerprint_of(llama, "main")
    for texts, said in [
        ([], "no sample"),
        ([torch.zeros(3)], "token ids"),
        ([torch.zeros(2, 3, dtype=torch.long)], r"\[T\]"),
        ([torch.zeros(128, dtype=torch.long)], "at most 128"),
    ]:
        with pytest.raises(ConfigError, match=said):
            calibrate_codebook(llama, texts, 3, mark, (BOS,), 1)
    with torch.no_grad():
        llama.model.layers[1].self_attn.k_proj.weight[0] = float("nan")
    with pytest.raises(CheckpointError, match="layer 1"):
        calibrate_codebook(llama, samples(), 3, mark)


def test_the_file(llama, tmp_path):
    levels, file = levels_of(llama, (BOS,), 1), tmp_path / "l.safetensors"
    levels.save(file)
    again = Codebook.load(file)
    assert (again.digest, again.calibration, again.fingerprint) == (
        levels.digest,
        levels.calibration,
        levels.fingerprint,
    )
    with pytest.raises(ConfigError, match="no such file"):
        Codebook.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match="cannot be read"):
        Codebook.load(tmp_path / "bad.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="no file with a KV codebook"):
        Codebook.load(tmp_path / "other.safetensors")
    tensors = load_file(file)
    tensors["key_levels"] = tensors["key_levels"][:, :5].contiguous()
    metadata = {"format": "intactkv-kv-codebook-1", "bits": "3", "fingerprint": levels.fingerprint.model_dump_json(), "calibration": json.dumps(vars(levels.calibration))}  # fmt: skip
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ConfigError, match=r"key_levels \(3, 5\) should be \(3, 8\)"):
        Codebook.load(file)
    save_file(tensors, file, metadata={**metadata, "bits": "100000000000"})  # whose power of two is 12 GB of digits
    with pytest.raises(ConfigError, match="expected 2 to 8 bits"):
        Codebook.load(file)
    tensors["low.0"] = tensors["low.0"].to(torch.float8_e4m3fn)
    save_file(tensors, file, metadata=metadata)
    with pytest.raises(ConfigError, match=r"low\.0 is of torch\.float8_e4m3fn"):
        Codebook.load(file)


def test_a_cell_with_levels(saved_llama, tokenizer, tmp_path):
    """From a text file to answers; levels of other bits, another pivot or another model are refused."""
    text = tmp_path / "some.jsonl"
    text.write_text(
        "\n".join(json.dumps({"text": f"The river number {n} rises and runs to the sea."}) for n in range(40))
    )
    file, loading = tmp_path / "l.safetensors", {"device": "cpu"}
    arguments = {"pretrained": str(saved_llama), "dtype": "float32", "pivot": "bos"}
    options = CodebookOptions(str(text), 3, samples=4, length=50)
    made = codebook_of_text(arguments, loading, options, file)
    assert (made.calibration.front, made.calibration.left_out, made.calibration.tokens) == ((BOS,), 1, 200)
    cell = {"kv_bits": 3, "kv_scheme": "pre_rope", "kv_codebook": str(file)}
    lm = IntactKVLM(**arguments, **loading, **cell, weights="rtn", bits=4, group_size=32)
    assert lm.cell_record()["kv_codebook"]["digest"] == made.digest
    with pytest.raises(ConfigError, match="drop rotate"):
        IntactKVLM(pretrained=str(saved_llama), dtype="float32", device="cpu", rotate=True, **cell)
    for changed, said in [
        ({"kv_bits": 4}, "got one of 3 bits"),
        ({"pivot": "none"}, "calibrated behind"),
        ({"kv_quantize_pivot": True}, "calibrated behind"),
        ({"pivot": "tokens:3"}, "calibrated behind"),
    ]:
        with pytest.raises(ConfigError, match=said):
            IntactKVLM(**{**arguments, **loading, **cell, **changed})
    other = tmp_path / "other"
    build_model("llama", seed=4).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ConfigError, match="whose weights are not those"):
            IntactKVLM(**{**arguments, "pretrained": str(other), "dtype": dtype}, **loading, **cell)
    IntactKVLM(**{**arguments, "dtype": "bfloat16"}, **loading, **cell)
    with pytest.raises(ConfigError, match="--quantize-pivot"):
        codebook_of_text({**arguments, "pivot": "none"}, loading, options._replace(quantize_pivot=True), file)
    with pytest.raises(ConfigError, match="ends in"):
        codebook_of_text(arguments, loading, options, tmp_path / "l.bin")


def test_the_command(saved_llama, tmp_path):
    text, file = tmp_path / "t.txt", tmp_path / "l.safetensors"
    text.write_text("The river rises in the hills and runs to the sea. " * 9)
    asked = [
        "kv-codebook",
        str(saved_llama),
        "--data",
        str(text),
        "--out",
        str(file),
        "--bits",
        "2",
        "--dtype",
        "float32",
    ]
    few = ["--samples", "3", "--length", "40", "--seed", "5"]
    done = CliRunner().invoke(app, [*asked, *few, "--pivot", "none", "--sink-tokens", "2"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "2 bits, 120 tokens of t.txt: 3 samples of 40 tokens, seed 5; first 2 rows left out" in done.output
    levels = Codebook.load(file)
    assert (levels.bits, levels.key_levels.shape, levels.calibration.front) == (2, (3, 4), (BOS,))
    cell = {"kv_bits": 2, "kv_scheme": "pre_rope", "kv_codebook": str(file), "kv_sink_tokens": 2, "pivot": "none"}
    IntactKVLM(pretrained=str(saved_llama), dtype="float32", device="cpu", **cell)
    with pytest.raises(DataError, match="one window has 512"):
        CliRunner().invoke(app, asked, catch_exceptions=False)
