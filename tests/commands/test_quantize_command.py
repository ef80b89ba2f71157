"""`intactkv quantize`: methods, calibration and resume through the command, on a real checkpoint."""

import json
import random

import pytest
import torch
from helpers.tiny import build_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.cli.main import app
from intactkv_eval.data.calibration_text import load_samples
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.model.activation_quant import activations_off
from intactkv_eval.quantize.job import METHODS, PRESETS, job_from, layout_of, options_of
from intactkv_eval.quantize.layerwise import BlockStore
from intactkv_eval.report.collect import identity_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(" ".join(random.Random(0).choices(["a", "word", "of", "some", "prose", "is", "here"], k=600)))
    return path


def run(*arguments):
    return CliRunner().invoke(app, ["quantize", *map(str, arguments)])


def quantize(source, out, text, *more, bits=3):
    options = ["--group-size", 32, "--dtype", "float32", "--bits", bits]
    data = ["--data", text, "--samples", 4, "--length", 24] if "--method" in more else []
    result = run(source, "--out", out, *options, *data, *more)
    assert result.exit_code == 0, result.output
    return load_file(out / "model.safetensors")


def record(out):
    return json.loads((out / "config.json").read_text())["intactkv_quantize"]


def test_gptq_is_calibrated_and_says_on_what(saved_llama, text, tmp_path):
    plain = quantize(saved_llama, tmp_path / "plain", text, "--method", "gptq")
    rtn = quantize(saved_llama, tmp_path / "rtn", text)
    aware = quantize(saved_llama, tmp_path / "aware", text, "--method", "gptq", "--pivot", "bos")
    seed = quantize(saved_llama, tmp_path / "seed", text, "--method", "gptq", "--seed", 1)
    name = "model.layers.1.mlp.down_proj.qweight"
    found = [made[name] for made in (plain, rtn, aware, seed)]
    assert all(not torch.equal(found[0], other) for other in found[1:])
    said = record(tmp_path / "aware")
    assert said["job"]["calibration"]["pivot"]["source"] == "bos"
    assert len(said["pivot_tokens"]) == 1
    assert record(tmp_path / "plain")["samples"] == said["samples"] != record(tmp_path / "seed")["samples"]
    assert len(said["samples"]["sha256"]) == 64
    quantize(saved_llama, tmp_path / "ordered", text, "--method", "gptq", "-o", "static_groups=false")
    for folder, ordered in (("plain", False), ("ordered", True)):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["quantization_config"]["desc_act"] is ordered
    lm = IntactKVLM(str(tmp_path / "aware"), reference=str(saved_llama), device="cpu", backend="dense")
    assert lm.cell_record()["quantization"]["made"]["job"]["method"] == "gptq"
    assert not list(tmp_path.glob(".*"))


def test_the_pivot_of_a_calibration_is_the_one_that_was_asked(saved_llama, text, tmp_path, monkeypatch):
    """`auto` is searched as a cell's is; a file is refused, since the KV in front is this model's own."""
    monkeypatch.setattr(
        "intactkv_eval.pivot.auto.automatic_tokens", lambda *given: (*given[1], 7) if given[3]() else ()
    )
    made = quantize(saved_llama, tmp_path / "auto", text, "--method", "gptq", "--pivot", "auto")
    assert record(tmp_path / "auto")["pivot_tokens"] == [256, 7]
    other = quantize(saved_llama, tmp_path / "ids", text, "--method", "gptq", "--pivot", "tokens:256+7")
    assert all(torch.equal(part, other[key]) for key, part in made.items())
    monkeypatch.setattr("intactkv_eval.pivot.auto.automatic_tokens", lambda *given: ())
    with pytest.raises(PivotError, match="pivot=auto: this model has no BOS and shows no pivot tokens"):
        raise run(saved_llama, "--out", tmp_path / "no", "--method", "gptq", "--data", text, "--pivot", "auto",
                  "--samples", 2, "--length", 16, "--group-size", 32).exception  # fmt: skip
    lm = IntactKVLM(str(saved_llama), dtype="float32", pivot="tokens:256+7+8", device="cpu")
    lm.pivoted_model.pivot.save(tmp_path / "p.safetensors")
    options = ["--method", "gptq", "--data", text, "--samples", 2, "--length", 16, "--group-size", 32]
    result = run(saved_llama, "--out", tmp_path / "file", *options, "--pivot", tmp_path / "p.safetensors")
    with pytest.raises(ConfigError, match=r"--pivot tokens:256\+7\+8"):
        raise result.exception
    assert not (tmp_path / "file").exists()


def test_a_killed_command_goes_on_to_the_same_bytes(saved_llama, text, tmp_path, monkeypatch):
    arguments = (text, "--method", "gptq", "--format", "compressed-tensors")
    quantize(saved_llama, tmp_path / "whole", *arguments)
    keep, kept = BlockStore.keep, []

    def killed(self, index, found):
        if index == 1:
            raise KeyboardInterrupt
        keep(self, index, found)
        kept.append(index)

    monkeypatch.setattr(BlockStore, "keep", killed)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        quantize(saved_llama, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(BlockStore, "keep", lambda self, index, found: (kept.append(index), keep(self, index, found)))
    other = run(saved_llama, "--out", tmp_path / "out", "--method", "gptq", "--data", text, "--length", 24,
                "--samples", 4, "--group-size", 32, "--format", "gptq")  # fmt: skip
    assert other.exit_code == 1
    assert "unfinished run of another job" in str(other.exception)
    quantize(saved_llama, tmp_path / "out", *arguments)
    assert kept == [0, 1, 2]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("method", "layout"), [("awq", "compressed-tensors"), ("omniquant", "compressed-tensors"), ("awq", "awq")]
)
def test_scaling_methods_are_loaded_behind_a_pivot(saved_llama, text, tmp_path, method, layout):
    more = ("-o", "epochs=2") if method == "omniquant" else ()
    quantize(saved_llama, tmp_path / "out", text, "--method", method, "--pivot", "bos", *more,
             bits=4 if layout == "awq" else 3)  # fmt: skip
    found = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["quant_method"]
    assert found == layout
    lm = IntactKVLM(str(tmp_path / "out"), reference=str(saved_llama), device="cpu", dtype="float32", backend="dense")
    assert lm.built.basis_residual < (0.2 if layout == "awq" else 0.35)
    with pytest.raises(ConfigError, match=f"{method} may scale V"):
        layout_of(job_from({"method": method}, []), "gptq")


def test_quarot_is_written_and_loaded(saved_llama, text, tmp_path):
    made = quantize(saved_llama, tmp_path / "out", text, "--method", "gptq", "--preset", "quarot-w4a4", "--pivot", "bos",
                    bits=4)  # fmt: skip
    config = json.loads((tmp_path / "out/config.json").read_text())
    said = config["quantization_config"]
    assert (said["quant_method"], said["symmetric"]) == ("intactkv", True)
    assert (said["activations"]["bits"], said["activations"]["clip"]) == (4, 0.9)
    assert said["rotation"]["online"]
    assert said["meta"]["symmetric_formula"] == "quarot"
    assert "lm_head.weight" in made
    lm = IntactKVLM(str(tmp_path / "out"), reference=str(saved_llama), device="cpu", dtype="float32", backend="dense",
                    kv_bits=4, kv_rotate=True, kv_clip=0.95)  # fmt: skip
    assert lm.built.basis_residual < 0.2
    record = lm.cell_record()
    assert record["quantization"]["made"]["job"]["options"]["shrink"] is True
    assert record["quantization"]["made"]["job"]["symmetric_formula"] == "quarot"
    assert identity_of(record).checkpoint == "gptq w4g32 sym-quarot act-order a4 clip 0.9 rotated calibrated behind bos"


def test_static_ranges_leave_the_pivots_activations_out(saved_llama, text, tmp_path):
    options = ("--act-bits", 8, "--act-scheme", "tensor", "--data", text, "--samples", 3, "--length", 24)
    plain = quantize(saved_llama, tmp_path / "plain", text, *options, bits=8)
    tokens = "tokens:256+" + "+".join(map(str, range(120, 160)))  # of which some have what no word of the text has
    aware = quantize(saved_llama, tmp_path / "aware", text, *options, "--pivot", tokens, bits=8)
    ranges = [key for key in plain if key.endswith("input_range")]
    assert len(ranges) == 3 * 7
    assert any(not torch.equal(plain[key], aware[key]) for key in ranges)
    assert torch.equal(plain["model.layers.0.mlp.up_proj.qweight"], aware["model.layers.0.mlp.up_proj.qweight"])
    where = {"device": "cpu", "dtype": "float32", "backend": "dense"}
    lm = IntactKVLM(str(tmp_path / "aware"), reference=str(saved_llama), pivot=tokens, **where)
    assert lm.cell_record()["quantization"]["activations"]["scheme"] == "tensor"
    lm.pivoted_model.pivot.save(tmp_path / "p.safetensors")
    shipped = IntactKVLM(str(tmp_path / "aware"), pivot=str(tmp_path / "p.safetensors"), **where)
    assert torch.equal(shipped.pivoted_model.pivot.values[1], lm.pivoted_model.pivot.values[1]), "RTN scales nothing"
    assert_ranges_of(lm, aware, load_samples(str(text), lm.tokenizer, 3, 24).tokens)


def assert_ranges_of(lm, made, windows):
    """They are the ends of what the layers of the checkpoint, its activations whole, get on the windows alone, behind
    the pivot; with its tokens run as text some are wider.
    """
    model, wider = lm.pivoted_model.model, 0
    for key in [key for key in made if key.endswith("input_range")]:
        ends = {}
        for pivot in (lm.pivoted_model.pivot, None):
            front, seen = PivotedModel(model, lm.pivoted_model.token_ids, pivot, KVSpec()), []
            layer = model.get_submodule(key.removesuffix(".input_range"))
            hook = layer.register_forward_pre_hook(lambda _, x, to=seen: to.append(x[0]))
            with activations_off(model):
                for window in windows:
                    front.logits(window[None])
            hook.remove()
            ends[pivot is not None] = torch.stack([torch.cat([x.flatten() for x in seen]).aminmax()[i] for i in (0, 1)])
        torch.testing.assert_close(made[key], ends[True], rtol=1e-3, atol=1e-4)
        wider += bool((ends[False].abs() > 1.01 * ends[True].abs()).any())
    assert wider


def test_a_static_checkpoint_takes_a_pivot_where_awq_is_not_known(text, tokenizer, tmp_path):
    model = build_model("phi3")
    model.save_pretrained(tmp_path / "phi3")
    tokenizer.save_pretrained(tmp_path / "phi3")
    options = ("--act-bits", 8, "--act-scheme", "tensor", "--data", text, "--samples", 3, "--length", 24)
    quantize(tmp_path / "phi3", tmp_path / "out", text, *options, bits=8)
    lm = IntactKVLM(str(tmp_path / "out"), reference=str(tmp_path / "phi3"), device="cpu", dtype="float32")
    ids = torch.arange(9)[None]
    with torch.no_grad():
        whole = IntactKVLM(str(tmp_path / "phi3"), device="cpu", dtype="float32").pivoted_model.logits(ids)
        found = lm.pivoted_model.logits(ids)
        with activations_off(lm.pivoted_model.model):
            weights_alone = lm.pivoted_model.logits(ids)
    assert 0 < (found - whole).norm() / whole.norm() < 0.1
    assert not torch.equal(found, weights_alone), "activations are quantized"


@pytest.mark.parametrize(
    ("given", "formula"),
    [
        ({"method": "rtn"}, "gptq"),
        ({"method": "gptq"}, "gptq"),
        ({"method": "awq"}, "awq"),
        ({"method": "omniquant"}, "omniquant"),
        ({"method": "quarot"}, "quarot"),
        ({"method": "rtn", "rotate": True}, "quarot"),
        ({"method": "gptq", "rotate": True}, "quarot"),
        ({"method": "gptq", "symmetric": False}, None),
        ({"method": "quarot", "symmetric": False}, None),
    ],
)
def test_symmetric_weights_follow_the_formula_of_their_method(given, formula):
    job = job_from({"symmetric": True, **given}, [])
    assert job.symmetric_formula == formula
    assert job.made().symmetric == formula
    assert job.model_dump(mode="json")["symmetric_formula"] == formula


def test_quarot_is_a_method_by_name():
    """The preset, in other bits where they are given; or another one's settings on a rotated model."""
    assert job_from({"method": "quarot"}, []) == job_from({}, [], "quarot-w4a4")
    assert job_from({"method": "quarot", "bits": 3}, []).bits == 3
    other = job_from({"method": "quarot"}, [], "intactkv-gptq-w3g128")
    assert (other.rotate, other.method, other.group_size) == (True, "gptq", 128)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_whole(preset):
    job = job_from({}, [], preset)
    assert job.options.keys() == options_of(job.method).keys()
    assert job_from({"bits": 4, "method": job.method}, [], preset).bits == 4


@pytest.mark.parametrize("preset", [name for name, said in PRESETS.items() if said["method"] == "gptq"])
def test_presets_keep_what_the_papers_ran_gptq_with(preset):
    options = job_from({}, [], preset).options
    assert (options["act_order"], options["static_groups"], options["damp"]) == (True, False, 0.01)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_named_with_their_defaults(method):
    for key, value in options_of(method).items():
        assert job_from({"method": method, "bits": 4}, [f"{key}={value}"]).options[key] == value


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({"method": "gpt", "bits": 4}, [], "use one of rtn, gptq, awq, omniquant, quarot"),
        ({"method": "gptq", "bits": 5}, [], "bits=5"),
        ({"method": "rtn", "bits": 4, "data": "c4"}, [], "--data: does nothing with --method rtn"),
        ({"method": "rtn", "bits": 4}, ["act_order=true"], "rtn has no options"),
        ({"method": "gptq", "bits": 4}, ["act_orde=true"], "did you mean 'act_order'"),
        ({"method": "gptq", "bits": 4}, ["act_order=maybe"], "--option act_order=maybe"),
        ({"method": "gptq", "bits": 4}, ["act_order"], "write KEY=VALUE"),
        ({"method": "gptq", "bits": 4}, ["damp=2"], "damp=2"),
        ({"method": "gptq", "bits": 4, "samples": 0}, [], "samples"),
        ({"method": "gptq", "bits": 4, "pivot": "boss"}, [], "did you mean 'bos'"),
        ({"method": "awq", "rotate": True}, [], "--rotate: awq scales channels"),
        ({"method": "rtn", "act_scheme": "tensor"}, [], "without --act-bits"),
        ({"method": "rtn", "act_bits": 7}, [], "act"),
    ],
)
def test_bad_jobs(given, options, message):
    with pytest.raises(ConfigError, match=message):
        job_from(given, options)


def test_what_cannot_be_done_is_said_before_anything_is_written(saved_llama, text, tmp_path):
    for arguments, message in (
        (("--length", 4000), "4000"),
        (("--device", "cuda:77"), "--device cuda:77"),
        (("--format", "awq"), "AWQ holds weights of 4 bits"),
        (("--format", "compressed-tensors", "-o", "static_groups=false"), "act-order is not written"),
        (("--data", "nowhere.txt"), "nowhere.txt"),
    ):
        result = run(saved_llama, "--out", tmp_path / "out", "--method", "gptq", "--bits", 3, "--group-size", 32,
                     "--data", text, "--samples", 2, "--length", 16, *arguments)  # fmt: skip
        assert result.exit_code != 0
        assert message in str(result.exception)
        assert not (tmp_path / "out").exists()
