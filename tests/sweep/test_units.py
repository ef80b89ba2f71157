"""What a YAML expands to, what it is refused for, and what decides whether a cell is the same cell."""

import shutil
import time
from pathlib import Path

import pytest
from helpers import spm
from helpers.grids import RTN, TASK, grid, units

from intactkv_eval.cell import formulas
from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.sweep import grid as grid_module
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.identity import digest_at
from intactkv_eval.sweep.preparation import CalibratePreparation, CodebookPreparation, QuantizePreparation
from intactkv_eval.sweep.spec import read_sweep

SWEEPS = sorted(shipped_folder("sweeps").glob("*.yaml"))
CELLS = {
    "kv": 192,
    "pivots": 12,
    "quantizers": 54,
    "smollm2": 28,
    "table1": 70,
    "table2": 50,
    "table3": 50,
    "table4": 66,
    "table5": 30,
}
GPTQ = {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "data": "wikitext2"}}


def test_a_grid_is_the_product_of_its_lists(saved_llama):
    kv = [{}, {"kv_bits": 4}, {"kv_bits": 3}]
    found = units(grid(saved_llama, kv=kv, seeds=[0, 1], tasks=[TASK, {"task": "intactkv_demo_qa", "seeds": [5]}]))
    assert len(found) == 2 * 3 * 2 * (2 + 1)
    assert len({unit.key for unit in found}) == len(found)
    assert {(unit.task.task, unit.seed) for unit in found} == {
        ("intactkv_demo_ppl", 0),
        ("intactkv_demo_ppl", 1),
        ("intactkv_demo_qa", 5),
    }
    assert [unit.weights for unit in found] == sorted(unit.weights for unit in found), "those that share come together"


def test_exclude(saved_llama):
    kv = [{}, {"kv_bits": 4}]
    assert len(units(grid(saved_llama, kv=kv, exclude=[{"weights": "rtn", "kv_bits": 4}]))) == 6
    assert len(units(grid(saved_llama, kv=kv, exclude=[{"weights": None, "pivot": ["bos", "auto"]}]))) == 6
    assert len(units(grid(saved_llama, weights=[{}, GPTQ], exclude=[{"quantize": "gptq", "pivot": "bos"}]))) == 3
    with pytest.raises(ConfigError, match="holds no cell"):
        units(grid(saved_llama, exclude=[{}]))


def test_grids_share_what_stands_beside_them(saved_llama):
    """Each cell once, also where two grids hold it; entries of two grids that are equal share their model."""
    made = {"kv": [{}, {"kv_bits": 4}], "pivots": ["none"]}
    found = units({**grid(saved_llama), "grids": [{"pivots": ["bos"]}, made, {**made, "weights": [RTN]}]})
    assert len(found) == 2 + 4
    assert len({unit.weights for unit in found}) == 2
    assert {unit.key for unit in found} < {unit.key for unit in units(grid(saved_llama, kv=made["kv"]))}


def test_what_is_made_is_made_once(saved_llama):
    levels = {"kv_bits": 3, "kv_scheme": "pre_rope", "codebook": {"data": "wikitext2"}}
    trained = {"pivot": "bos", "calibrate": {"data": "conversations.json"}}
    found = units(grid(saved_llama, weights=[GPTQ], kv=[{}, levels], pivots=["none", "bos", trained]))
    made = {preparation.name: preparation for unit in found for preparation in unit.preparations}
    kinds = [
        sum(isinstance(one, kind) for one in made.values())
        for kind in (QuantizePreparation, CodebookPreparation, CalibratePreparation)
    ]
    assert kinds == [1, 2, 1], "levels of `bos` serve the trained rows too"
    intact, computed = (next(u for u in found if u.cell.pivot.intact is flag) for flag in (True, False))
    assert intact.cell.model.reference == str(saved_llama)
    assert computed.cell.model.reference is None
    assert next(unit for unit in found if unit.label.count("calibrated")).cell.pivot.source.startswith("@made/")


def test_a_cell_is_known_by_what_it_holds(saved_llama, tmp_path, monkeypatch):
    def keys(model, **parts):
        return [unit.key for unit in units(grid(model, **parts))]

    here = keys(saved_llama)
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(saved_llama, elsewhere)
    assert keys(elsewhere) == here, "not by its folder's name"
    assert keys(saved_llama, run={"batch_size": 8, "retries": 0}) == here, "nor by how it is run"
    assert not set(here) & set(keys(saved_llama, tasks=[{**TASK, "limit": 5}]))
    assert not set(here) & set(keys(saved_llama, seeds=[1]))
    weights = elsewhere / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    grid_module.key_of.__globals__["digest_at"].cache_clear()
    assert not set(here) & set(keys(elsewhere))
    monkeypatch.setattr(grid_module, "versions", lambda: {"lm_eval": "0.9"})
    assert not set(here) & set(keys(saved_llama))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weights": [{"weights": "rtn"}]}, r"needs bits=2, 3, 4 or 8.*exclude"),
        ({"weights": [{"wieghts": "rtn"}]}, "weights: unknown argument 'wieghts': did you mean 'weights'"),
        ({"kv": [{"bits": 3}]}, "kv: unknown argument 'bits'"),
        ({"weights": [{**RTN, "backend": "dense"}], "models": [{"pretrained": "m", "backend": "cpu"}]}, "given twice"),
        ({"models": [{"dtype": "float32"}]}, "names no model"),
        ({"models": [{"pretrained": "m", "dtpye": "float32"}]}, "did you mean 'dtype'"),
        (
            {"weights": [{"quantize": {"method": "gptq", "data": "c4", "tokens": 5}}]},
            "tokens: Extra inputs",
        ),
        ({"weights": [{"quantize": "gptq"}]}, "valid dictionary"),
        ({"kv": [{"kv_bits": 3, "codebook": {"data": "c4"}}]}, "codebook: does nothing without kv_scheme: pre_rope"),
        ({"pivots": [{"pivot": "bos", "calibrate": {"dta": "x"}}]}, "dta: Extra inputs"),
        ({"tasks": []}, "tasks: .*at least 1"),
        ({"grid": 1}, "grid: Extra inputs"),
        ({"grids": []}, "grids: .*at least 1"),
        ({"grids": [{}, {"wieghts": []}]}, r"grids\.1\.wieghts: Extra inputs"),
        ({"grids": [{"wieghts": []}, {}]}, r"grids\.0\.wieghts: Extra inputs"),
        ({"grids": {"kv": []}}, "grids: .*valid tuple"),
        ({"grids": [3]}, "valid dictionary"),
    ],
)
def test_what_is_wrong_is_named(parts, message):
    with pytest.raises(ConfigError, match=message):
        units({**grid("m"), **parts})


def test_a_product_without_end():
    """Four kilobytes of lists multiply to 128,000 cells."""
    many = {"weights": [{**RTN, "group_size": size + 1} for size in range(40)], "pivots": ["bos"],
            "kv": [{"kv_bits": 4, "kv_sink_tokens": keep} for keep in range(40)], "seeds": list(range(40))}  # fmt: skip
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="multiply to 64000 cells; expected at most 10000"):
        units(grid("m", **many))
    with pytest.raises(ConfigError, match="multiply to 12800 cells"):
        units({**grid("m", **many), "grids": [{"seeds": [1, 2, 3, 4]}] * 2})
    assert time.monotonic() - begun < 5


def test_the_versions_are_read_once():
    """Reading them took nine tenths of the time in which a large sweep starts."""
    assert grid_module.versions() is grid_module.versions()


def test_damaged_yaml():
    with pytest.raises(ConfigError, match="no YAML"):
        read_sweep("models: [", "grid.yaml")
    with pytest.raises(ConfigError, match=r"grid\.yaml: the whole"):
        read_sweep("- 1", "grid.yaml")


@pytest.mark.parametrize("file", SWEEPS, ids=[file.stem for file in SWEEPS])
def test_every_shipped_sweep_expands(file):
    found = expand_file(file)
    assert len(found) == CELLS[file.stem]
    assert len({(unit.label, unit.seed) for unit in found}) == len(found), "each cell is told from the others"
    computed = {unit.label.split(" | ")[0] for unit in found if not unit.cell.pivot.intact}
    assert computed == {unit.label.split(" | ")[0] for unit in found}, "every model has its baselines"


def expand_file(file: Path):
    return grid_module.expand(read_sweep(file.read_text(), file.name))


KV = {"kv": [{"kv_bits": 4}]}
MADE = [
    ("weights.rtn", {"weights": [RTN]}),
    ("kv.token_head", KV),
    (
        "weights.gptq.small_groups",
        {"weights": [{"quantize": {**GPTQ["quantize"], "options": {"static_groups": False}}}]},
    ),
    ("codebook", {"kv": [{"kv_bits": 4, "kv_scheme": "pre_rope", "codebook": {"data": "wikitext2"}}]}),
    ("calibration", {"pivots": [{"pivot": "bos", "calibrate": {"data": "answers.jsonl"}}]}),
    ("chat", {"pivots": [{"pivot": "bos", "chat_template": "vicuna_v1.1", "calibrate": {"data": "answers.jsonl"}}]}),
]


@pytest.mark.parametrize(("formula", "parts"), MADE, ids=[name for name, _ in MADE])
def test_a_result_of_an_older_revision_is_not_reused(saved_llama, tmp_path, monkeypatch, formula, parts):
    """A sweep's folder from before a formula changed: its cells are measured anew, and its files made anew."""
    folder = SweepFolder(tmp_path / "out")
    given = grid(saved_llama, weights=[{}], **{key: value for key, value in parts.items() if key != "weights"})
    given |= {key: value for key, value in parts.items() if key == "weights"}
    before = units(given)
    made = {one.name for unit in before for one in unit.preparations}
    for unit in before:
        folder.start(unit.key)
        folder.place(unit.key, {"seconds": 1.0})
    assert all(folder.is_done(unit.key) for unit in units(given)), "a control: without a change all of it is reused"
    revisions = {**formulas.REVISIONS, formula: formulas.REVISIONS[formula] + 1}
    monkeypatch.setattr(formulas, "REVISIONS", revisions)
    after = units(given)
    assert not any(folder.is_done(unit.key) for unit in after)
    assert not made & {one.name for unit in after for one in unit.preparations}


@pytest.mark.parametrize(
    ("parts", "is_chat"),
    [
        ({}, False),
        ({"tasks": [{**TASK, "apply_chat_template": True}]}, True),
        ({"tasks": [{"task": "mt_bench"}]}, True),
        ({"tasks": [{"task": "vicuna_bench"}]}, True),
        ({"pivots": [{"pivot": "prompt"}]}, True),
    ],
)
def test_cells_with_chat_prompts_have_the_formula_of_these(saved_llama, monkeypatch, parts, is_chat):
    """A sweep knows no tokenizer, so all of them have it."""
    before = {unit.key for unit in units(grid(saved_llama, **parts))}
    monkeypatch.setattr(formulas, "REVISIONS", {**formulas.REVISIONS, "chat": 1})
    assert (before != {unit.key for unit in units(grid(saved_llama, **parts))}) is is_chat


def test_a_tokenizer_is_known_by_its_model(tmp_path):
    """Vicuna's folder holds no other word of it."""
    for name, content in (("one", None), ("two", spm.model_bytes() + b" ")):
        spm.save(tmp_path / name, True, content)
    assert digest_at(tmp_path / "one") != digest_at(tmp_path / "two")


def test_a_result_from_before_revisions_is_not_reused(saved_llama):
    """The keys of the releases before had no formulas in them."""
    unit = units(grid(saved_llama, weights=[{}], **KV))[0]
    made = [preparation.name for preparation in unit.preparations]
    said = {"arguments": dict(unit.arguments), "made": made, "task": unit.task.model_dump(exclude={"seeds"})}
    assert unit.key != grid_module.key_of({**said, "seed": unit.seed, "versions": grid_module.versions()})
