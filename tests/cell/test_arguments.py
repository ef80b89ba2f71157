"""A cell from flat arguments: everything acts or is refused."""

import pytest

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.config_files import config_names, load_config
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.errors import ConfigError

RTN = {"pretrained": "m", "weights": "rtn", "bits": 4}


def test_defaults():
    cell = cell_from_args({"pretrained": "m"})
    assert (cell.weights.method, cell.kv.bits, cell.pivot.source, cell.pivot.intact) == ("none", 16, "bos", True)
    assert cell_from_args(RTN).weights.group_size == 128


@pytest.mark.parametrize("none", [None, "none", "None"])
def test_none_is_the_baseline_and_not_the_default(none):
    """lm_eval's parser turns the word none into Python's None before we see it."""
    cell = cell_from_args({"pretrained": "m", "pivot": none, "weights": none})
    assert not cell.pivot.intact
    assert cell.weights.method == "none"
    assert cell == cell_from_args({"pretrained": "m", "pivot": "bos", "intact": False})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "pretrained"),
        ({"pretrained": "m", "pivto": "bos"}, "'pivot'"),
        ({"pretrained": "m", "act_bits": 5}, "act_bits=5"),
        ({"pretrained": "m", "act_clip": 0.9}, "act_clip: does nothing without quantized activations"),
        ({"pretrained": "m", "act_bits": 8, "act_scheme": "tensor"}, "act_scheme=tensor .*`intactkv quantize`"),
        ({"pretrained": "m", "act_bits": 8, "act_clip": 0}, "act_clip=0"),
        ({"pretrained": "m", "act_bits": 8, "act_scheme": "row"}, "act_scheme='row'"),
        ({"pretrained": "m", "kv_rotate": True}, "kv_rotate: does nothing without a quantized KV cache"),
        ({"pretrained": "m", "kv_bits": 4, "kv_clip": 1.5}, "kv_clip=1.5"),
        ({"pretrained": "m", "rotate": True}, "rotate: does nothing where nothing is quantized"),
        ({"pretrained": "m", "weights": "awq", "bits": 4, "awq_search": "s.pt", "rotate": True}, "unrotated model"),
        ({"pretrained": "m", "bits": 4}, "does nothing"),
        ({"pretrained": "m", "group_size": 64}, "does nothing"),
        ({"pretrained": "m", "kv_sink_tokens": 1}, "does nothing"),
        ({"pretrained": "m", "pivot": "none", "reference": "r"}, "does nothing"),
        ({"pretrained": "m", "pivot": "p.safetensors", "reference": "r"}, "does nothing"),
        ({"pretrained": "m", "awq_search": "s.pt"}, "does nothing"),
        ({"pretrained": "m", "weights": "awq", "bits": 4}, "weights=awq needs awq_search"),
        ({"pretrained": "m", "weights": "rtn", "bits": 4, "awq_search": "s.pt"}, "nothing else takes it"),
        ({"pretrained": "m", "backend": "cuda"}, "backend"),
        ({"pretrained": "m", "kv_bits": "abc"}, "kv_bits='abc'"),
        ({"pretrained": "m", "kv_quantize_pivot": True}, "does nothing"),
        ({"pretrained": "m", "kv_bits": 4, "kv_quantize_pivot": True, "pivot": "none"}, "kv_quantize_pivot: does nothing"),
        ({"pretrained": "m", "kv_bits": 4, "kv_group_size": 32}, "kv_group_size and kv_residual_length: do nothing"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "pre_rope", "kv_residual_length": 32}, "kv_group_size and kv_residual_length"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "channel_key", "kv_residual_length": 100}, "kv_residual_length=100 is no multiple"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "channel_key", "kv_residual_length": 0}, "kv_residual_length=0"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "channel_key", "kv_group_size": 1}, "kv_group_size=1"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "channel_key", "kv_codebook": "f"}, "no other takes it"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "pre_rope"}, "needs kv_codebook=FILE"),
        ({"pretrained": "m", "kv_bits": 4, "kv_scheme": "chanel_key"}, "kv_scheme='chanel_key'"),
        ({"config": 5}, "no such cell"),
        ({"pretrained": "m", "pivot": "none", "intact": True}, "contradict"),
        ({"pretrained": "m", "pivot": "boss"}, "'bos'"),
        ({"pretrained": "m", "pivot": "tokens:a"}, "numbers"),
        ({"pretrained": "m", "pivot": "tokens:²"}, "numbers"),
        ({"pretrained": "m", "pivot": "tokens:1+٣"}, "numbers"),
        ({"pretrained": "m", "pivot": "tokens:" + "9" * 5000}, "numbers"),
        ({"pretrained": "m", "pivot": "tokens:1", "2": ""}, "commas"),
        ({"pretrained": "m", "pivot": 7}, "tokens:7"),
        *(({**RTN, key: 16**5000}, f"{key}: a number of more than 64 bits") for key in ("bits", "act_bits", "pivot")),
        ({**RTN, "foo": 16**5000}, "unknown argument 'foo'"),
        ({**RTN, "bits": 5}, "bits=5"),
        ({"pretrained": "m", "weights": "rtn"}, "needs bits"),
        ({**RTN, "group_size": 0}, "group_size=0"),
        ({**RTN, "group_size": -2}, "group_size=-2"),
        ({**RTN, "kv_bits": 1}, "kv_bits=1"),
        ({**RTN, "weights": "gptqq"}, "weights='gptqq'"),
        ({**RTN, "backend": "cuda"}, "backend='cuda'"),
        ({"config": "no-such-cell"}, "no such cell"),
        ({"config": "/nowhere/x.yaml"}, "cannot be read"),
    ],
)  # fmt: skip
def test_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        cell_from_args(arguments).pivot.token_ids  # noqa: B018  a tokens: source is read when it is asked for


def test_explicit_arguments_win_over_the_file(tmp_path):
    file = tmp_path / "cell.yaml"
    file.write_text("pretrained: m\nweights: rtn\nbits: 3\npivot: bos\n")
    cell = cell_from_args({"config": str(file), "bits": 4, "pivot": None})
    assert (cell.model.pretrained, cell.weights.bits, cell.pivot.intact) == ("m", 4, False)


def test_a_replaced_choice_takes_its_details_with_it(tmp_path):
    """Full precision of a quantized config is weights=none, without an error about the file's bits."""
    file = tmp_path / "cell.yaml"
    file.write_text("pretrained: m\nweights: rtn\nbits: 3\nkv_bits: 4\nkv_sink_tokens: 1\npivot: bos\n")
    file.write_text(file.read_text() + "rotate: true\nact_bits: 4\nact_clip: 0.9\nkv_rotate: true\nkv_clip: 0.95\n")
    everything = {"weights": None, "act_bits": 16, "kv_bits": 16, "pivot": "none"}
    cell = cell_from_args({"config": str(file), **everything})
    assert cell == cell_from_args({"pretrained": "m", "pivot": "none"})
    assert cell_from_args({"config": str(file), "weights": "rtn"}).weights.bits == 3


def test_kv_schemes(tmp_path):
    cell = cell_from_args({"pretrained": "m", "kv_bits": 2, "kv_scheme": "channel_key"})
    assert (cell.kv.group_size, cell.kv.residual_length) == (32, 128)
    assert cell_from_args({"pretrained": "m", "kv_bits": 2}).kv.group_size is None
    file = tmp_path / "cell.yaml"
    file.write_text("pretrained: m\nkv_bits: 2\nkv_scheme: channel_key\nkv_group_size: 64\nkv_quantize_pivot: true\n")
    replaced = {"kv_scheme": "pre_rope", "kv_codebook": "f.safetensors"}
    kv = cell_from_args({"config": str(file), **replaced}).kv
    assert (kv.bits, kv.group_size, kv.codebook, not kv.quantize_pivot) == (2, None, "f.safetensors", False)
    baseline = cell_from_args({"config": str(file), "pivot": "none"}).kv
    assert (baseline.group_size, baseline.quantize_pivot) == (64, False)
    assert cell_from_args({"config": str(file), "intact": False}).kv == baseline


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "config: other\n", "\0"])
def test_damaged_files(tmp_path, text):
    file = tmp_path / "cell.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        cell_from_args({"config": str(file)})


@pytest.mark.parametrize("name", config_names())
def test_law_13_every_shipped_cell_loads(name):
    cell = cell_from_args({"config": name})
    assert cell.pivot.intact or cell.weights.method == "none"
    baseline = cell_from_args({"config": name, "pivot": cell.pivot.source, "intact": False})
    assert baseline.model_copy(update={"pivot": cell.pivot}) == cell


def test_shipped_cells_cover_the_papers_models():
    hubs = " ".join(load_config(name)["pretrained"] for name in config_names())
    for family in (
        "vicuna-7b-v1.5",
        "vicuna-33b-v1.3",
        "llama-65b",
        "Llama-2-70b",
        "Meta-Llama-3-8B",
        "Mistral-7B",
        "opt-",
    ):
        assert family in hubs


def test_quarot_and_unrotated_w4a4_are_one_cell_each():
    flat = {**RTN, "group_size": -1, "symmetric": True, "act_bits": 4, "act_clip": 0.9}
    plain, turned = cell_from_args(flat), cell_from_args({**flat, "rotate": True, "kv_bits": 4, "kv_rotate": True})
    assert (plain.activations.bits, plain.activations.scheme, plain.activations.clip) == (4, "token", 0.9)
    assert (plain.weights.rotate, turned.weights.rotate, turned.kv.rotate) == (False, True, True)
    assert cell_from_args({"pretrained": "m", "act_bits": 4, "rotate": True}).weights.method == "none"


def test_token_lists():
    for text in ("tokens:1+319+13563", "tokens:1,319,13563", "tokens: 1 319 13563"):
        assert cell_from_args({"pretrained": "m", "pivot": text}).pivot.token_ids == (1, 319, 13563)


def test_a_cell_is_frozen_and_survives_json():
    cell = cell_from_args({**RTN, "kv_bits": 3, "kv_sink_tokens": 1})
    assert CellSpec.model_validate_json(cell.model_dump_json()) == cell
    with pytest.raises(ValueError, match="frozen"):
        cell.backend = "dense"
