"""Published figures beside ours: the same cell of the same model, and nothing else."""

import json

import pytest
from test_report import write

from intactkv_eval.cell.config_files import config_names, load_config
from intactkv_eval.report.collect import collect
from intactkv_eval.report.grid import grid_of
from intactkv_eval.report.published import beside, figures
from intactkv_eval.report.tables import markdown

RTN = {"pretrained": "meta-llama/Llama-2-7b-hf", "weights": "rtn", "bits": 3, "group_size": 128, "pivot": "bos"}


def found(tmp_path, cell, task="ppl_c4", record=None, **settings):
    path = write(tmp_path, cell, [2.1, 2.3], 1, task=task, record=record, **settings)
    runs, _ = collect([path])
    return beside(grid_of(runs)), markdown(runs)


def printed(model, method, pivot, task="ppl_c4"):
    (one,) = [f for f in figures() if f.key[0] == frozenset(model.lower().split("-")) and f.key[1] == method
              and f.key[6] == pivot and f.task == task]  # fmt: skip
    return one.value


@pytest.mark.parametrize(
    ("change", "method", "pivot"),
    [
        ({}, "rtn", "bos"),
        ({"pivot": "none"}, "rtn", "none"),
        ({"weights": None, "bits": None, "group_size": None, "pivot": "none"}, "fp", "none"),
    ],
)
def test_a_cell_finds_its_figure(tmp_path, change, method, pivot):
    cell = {key: value for key, value in {**RTN, **change}.items() if value is not None}
    rows, text = found(tmp_path, cell)
    assert [row.published.value for row in rows if row.published.source.startswith("IntactKV README")] == [
        printed("LLaMA-2-7B", method, pivot)
    ]
    assert rows[0].protocol == ""
    assert "Beside published figures:" in text
    assert f"| {rows[0].difference:+.2f} | the same | IntactKV README, table 1 |" in text


@pytest.mark.parametrize(
    "change",
    [{"bits": 4}, {"group_size": 64}, {"pretrained": "meta-llama/Llama-2-7b-chat-hf"}, {"pivot": "prompt"}, {"kv_bits": 4},
     {"pretrained": "llama-2-13b-v2"}, {"intact": False, "pivot": "tokens:4"}],
)  # fmt: skip
def test_another_cell_finds_none(tmp_path, change):
    cell = {**RTN, **change}
    rows, text = found(tmp_path, cell)
    assert not rows
    assert "Beside published" not in text


def test_another_protocol_is_named(tmp_path):
    rows, _ = found(tmp_path, RTN, limit=8.0)
    assert rows[0].protocol == "ours: limit 8"
    path = tmp_path / "results_1.json"
    content = json.loads(path.read_text())
    content["configs"]["ppl_c4"]["metadata"]["protocol"] = "bos-window-512"
    path.write_text(json.dumps(content))
    assert "theirs: bos-window-2048; ours: limit 8" in markdown(collect([tmp_path])[0])


def test_what_no_printed_cell_has_is_named(tmp_path):
    assert found(tmp_path, {**RTN, "symmetric": True})[0][0].protocol == "ours: symmetric"
    assert not found(tmp_path, {**RTN, "rotate": True})[0]
    path = tmp_path / "results_1.json"
    write(tmp_path, RTN, [2.1, 2.3], 1, task="ppl_c4")
    path.write_text(json.dumps({**json.loads(path.read_text()), "n-samples": {"ppl_c4": {"effective": 4}}}))
    assert "ours: 4 documents of 256" in markdown(collect([tmp_path])[0])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n-shot": {"ppl_c4": 5}}, "ours: 5 shots"),
        ({"chat_template_sha": "x", "fewshot_as_multiturn": True}, "ours: chat template"),
        ({"system_instruction_sha": "x"}, "ours: system instruction"),
    ],
)
def test_other_prompts_are_named(tmp_path, change, named):
    found(tmp_path, RTN)
    path = tmp_path / "results_1.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert beside(grid_of(collect([path])[0]))[0].protocol == named


@pytest.mark.parametrize(
    ("kv", "clip", "formula", "said"),
    [
        ({"kv_rotate": True, "kv_clip": 0.95}, 0.9, "quarot", ""),
        ({}, 0.9, "quarot", "ours: another KV scheme"),
        ({"kv_rotate": True, "kv_clip": 0.9}, 0.9, "quarot", "ours: another KV scheme"),
        ({"kv_rotate": True, "kv_clip": 0.95}, 1.0, "quarot", "ours: other clipping of activations"),
        ({"kv_rotate": True, "kv_clip": 0.95}, 0.9, None, "ours: scales of weights not by QuaRot's symmetric formula"),
    ],
)
def test_quarots_cache_is_rotated_and_clipped(tmp_path, kv, clip, formula, said):
    quantization = {
        "method": "gptq", "bits": 4, "group_size": -1, "symmetric": True, "act_order": True, "mixed": False,
        "rotation": {"kind": "hadamard"}, "activations": {"bits": 4, "clip": clip},
        "made": {"job": {"symmetric_formula": formula}},
    }  # fmt: skip
    cell = {"pretrained": "Llama-2-7b-hf", "pivot": "none", "kv_bits": 4, **kv}
    rows, _ = found(tmp_path, cell, record={"quantization": quantization})
    assert rows[0].published.value == printed("LLaMA-2-7B", "quarot", "none")
    assert rows[0].protocol == said


def test_checkpoints_are_known_by_their_reference_and_label(tmp_path):
    quantization = {
        "method": "gptq",
        "bits": 3,
        "group_size": 128,
        "symmetric": False,
        "act_order": True,
        "mixed": False,
    }
    cell = {"pretrained": "me/some-gptq", "reference": "huggyllama/llama-7b", "pivot": "bos"}
    rows, _ = found(tmp_path, cell, record={"quantization": quantization})
    assert rows[0].published.value == printed("LLaMA-7B", "gptq", "bos")


def test_shipped_cells_of_the_paper_have_their_figures():
    """Every shipped W3 cell of a published model is found by the words of its name."""
    known = {figure.key[0] for figure in figures()}
    names = [
        load_config(name)["pretrained"] for name in config_names() if name.startswith(("llama-7b", "llama-2", "vicuna"))
    ]
    assert len(names) >= 8
    for name in names:
        words = frozenset(name.split("/")[-1].lower().split("-")) - {"hf", "meta"}
        assert words in known, name
