"""An output replaces nothing but a file of its own kind: no input, no file of a model, under whatever name it is given."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from intactkv_eval.cli.main import app
from intactkv_eval.commands import outputs
from intactkv_eval.commands.outputs import check_output
from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.codebook import FORMAT as LEVELS_FORMAT
from intactkv_eval.mt_bench.answers import Answer, Choice, write_answers
from intactkv_eval.pivot.kv import FORMAT as PIVOT_FORMAT
from intactkv_eval.pivot.prefix_file import FORMAT as PREFIX_FORMAT
from intactkv_eval.training.run_state import _COLUMNS

REFERENCE = Path(__file__).parents[2] / "results" / "reference"


@pytest.fixture(autouse=True)
def loads_nothing(monkeypatch):
    """What is refused is refused before a model is loaded."""

    def load(*_arguments, **_named):
        raise AssertionError("a model was loaded")

    for module in ("calibrate", "figures"):
        monkeypatch.setattr(f"intactkv_eval.commands.{module}.IntactKVLM", load)
    for module in ("capture", "find_pivots", "kv_codebook"):
        monkeypatch.setattr(f"intactkv_eval.commands.{module}.load_cell", load)


@pytest.fixture
def place(saved_llama, tmp_path):
    """A folder with a model, a text and results; and what all of its files are."""
    (tmp_path / "text.txt").write_text("A text. " * 100)
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    shutil.copytree(REFERENCE, tmp_path / "results", ignore=shutil.ignore_patterns("samples_*"))
    (tmp_path / "notes.md").write_text("# Mine\n")
    for ending in (".safetensors", ".json", ".csv", ".html", ".tex"):
        (tmp_path / f"mine{ending}").write_text("[1, 2]")
    return tmp_path


def contents(folder):
    return {p: (hashlib.sha256(p.read_bytes()).hexdigest(), p.is_symlink()) for p in folder.rglob("*") if p.is_file()}


def commands(place, out):
    """A call of each command that takes `--out` for a file of this ending."""
    model, text, ending = str(place / "llama"), str(place / "text.txt"), Path(out).suffix
    cell = f"pretrained={model},weights=rtn,bits=4,group_size=32"
    if ending == ".safetensors":
        yield ["capture", model]
        yield ["kv-codebook", model, "--data", text]
        yield ["calibrate", "--model_args", cell, "--data", str(place / "talks.jsonl")]
    elif ending == ".json":
        yield ["pivots", model, "--data", text]
    if ending in {".md", ".json", ".csv", ".tex", ".html"}:
        yield ["report", str(place / "results")]


def refused(call, out, message, *more):
    done = CliRunner().invoke(app, [*map(str, call), "--out", str(out), *more])
    assert isinstance(done.exception, ConfigError), done.output + repr(done.exception)
    with pytest.raises(ConfigError, match=message):
        raise done.exception


MODEL_FILES = ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
NEW_NAMES = ["adapter_model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "quantize_config.json",
             "MODEL.safetensors", "Config.json", "tokenizer.md", "pytorch_model.bin.index.json"]  # fmt: skip


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
@pytest.mark.parametrize("name", [*MODEL_FILES, *NEW_NAMES])
def test_no_file_of_a_model_is_replaced_or_made(place, name, overwrite):
    """`capture --out MODEL/model.safetensors` ended with exit code 0, and the model was gone."""
    before = contents(place)
    calls = list(commands(place, name))
    assert calls
    for call in calls:
        refused(call, place / "llama" / name, "would be a file of the model in", *overwrite)
    assert contents(place) == before


def links(place):
    """Other names of the weights: links, a detour, another folder."""
    model, weights = place / "llama", place / "llama" / "model.safetensors"
    (place / "soft.safetensors").symlink_to(weights)
    (place / "folder").symlink_to(model)
    (place / "chain.safetensors").symlink_to("soft.safetensors")
    (place / "hard.safetensors").hardlink_to(weights)
    return ["soft.safetensors", "folder/model.safetensors", "chain.safetensors", "hard.safetensors",
            "llama/../llama/./model.safetensors"]  # fmt: skip


def test_other_names_of_the_weights_are_known(place, monkeypatch):
    names = links(place)
    before = contents(place)
    for name in names:
        for call in commands(place, name):
            refused(call, place / name, "of the model|is not a PivotKV|is not a KV codebook")
    monkeypatch.chdir(place)
    refused(["capture", "llama"], "soft.safetensors", "of the model", "--overwrite")
    assert contents(place) == before


def test_an_input_is_never_replaced(place):
    results = sorted((place / "results").glob("results_*.json"))[0]
    (place / "again.json").hardlink_to(results)
    (place / "linked.json").symlink_to(results)
    before = contents(place)
    for out in (results, place / "again.json", place / "linked.json"):
        for source in (results, results.parent):
            for more in ([], ["--overwrite"]):
                refused(
                    ["report", source], out, "is the input|is not figures of" if more == [] else "is the input", *more
                )
    assert contents(place) == before


def test_the_answers_of_a_calibration_are_not_written_over_its_questions(place):
    """OUT.answers.jsonl beside --out may be the very file that the questions come from."""
    talks = place / "p.answers.jsonl"
    (place / "talks.jsonl").rename(talks)
    call = [
        "calibrate",
        "--model_args",
        f"pretrained={place / 'llama'},weights=rtn,bits=4",
        "--data",
        talks,
        "--generate-answers",
        "8",
    ]
    refused(call, place / "p.safetensors", r"p\.answers\.jsonl: is the input")
    (place / "q.csv").write_text("name,phone\n")
    refused(call, place / "q.safetensors", r"q\.csv: is there already, and is not the log of a calibration")
    pivot = [
        "calibrate",
        "--model_args",
        f"pretrained={place / 'llama'},weights=rtn,bits=4,pivot={place / 'mine.safetensors'}",
    ]
    refused([*pivot, "--data", talks], place / "mine.safetensors", "is the input")
    cell = place / "cell.yaml"
    cell.write_text(f"pretrained: {place / 'llama'}\npivot: {place / 'mine.safetensors'}\n")
    refused(
        ["calibrate", "--model_args", f"config={cell}", "--data", talks], place / "mine.safetensors", "is the input"
    )


@pytest.mark.parametrize("ending", [".safetensors", ".json", ".csv", ".html", ".tex", ".md"])
def test_a_file_of_another_kind_stays_unless_it_may_be_lost(place, ending):
    out = place / ("notes.md" if ending == ".md" else f"mine{ending}")
    before = contents(place)
    for call in commands(place, out):
        refused(call, out, "is there already, and is not .*--overwrite")
    assert contents(place) == before
    check_output(out, outputs.PIVOT, [place / "results"], overwrite=True)


@pytest.mark.parametrize("ending", ["md", "csv", "tex", "json", "html"])
def test_a_report_is_written_again(place, ending):
    for folder in (place, place / "results"):
        for _ in range(2):
            done = CliRunner().invoke(app, ["report", str(place / "results"), "--out", str(folder / f"table.{ending}")])
            assert done.exit_code == 0, done.exception
    done = CliRunner().invoke(app, ["report", str(place / "results"), "--out", str(place / "mine.csv"), "--overwrite"])
    assert done.exit_code == 0, done.exception
    assert (place / "mine.csv").read_text().startswith("model,weights,kv,pivot,")


def test_what_is_no_file_is_not_replaced(place):
    (place / "dir.md").mkdir()
    os.mkfifo(place / "pipe.md")
    (place / "dangling.md").symlink_to(place / "nowhere.md")
    (place / "device.md").symlink_to("/dev/null")
    for name, message in {
        "dir.md": "no regular",
        "pipe.md": "no regular",
        "device.md": "no regular",
        "dangling.md": "leads nowhere",
    }.items():
        refused(["report", place / "results"], place / name, message, "--overwrite")
    (place / "empty.md").touch()
    check_output(place / "empty.md", outputs.TABLES["md"])
    check_output(
        place / "new" / "folder" / "x.md",
        outputs.TABLES["md"],
        [place / "notes.md", "org/model", "x" * 5000, "\0", None, 7],
    )


def test_figures_of_another_are_not_drawn_over(place):
    folder = place / "pictures"
    folder.mkdir()
    (folder / "attention.png").write_bytes(b"a holiday")
    call = [
        "figures",
        "--model_args",
        f"pretrained={place / 'llama'},weights=rtn,bits=4",
        "--data",
        str(place / "text.txt"),
    ]
    refused(call, folder, r"attention\.png: is there already")
    (folder / "attention.png").unlink()
    (folder / "figures.json").write_text('{"other": 1}')
    refused(call, folder, r"figures\.json: is there already, and is not the numbers")
    numbers = {"settings": "s", "words": ["a"], "pivot_words": ["b"], "layers": [0]}
    (folder / "figures.json").write_text(json.dumps(numbers, indent=1))
    for name in ("figures.npz", "attention.png"):
        (folder / name).write_bytes(b"x")
    outputs.check_figures(folder, ["attention.png"], [], overwrite=False)


def test_answers_and_replies_of_another_stay(place):
    answers = place / "model_answer" / "gpt.jsonl"
    write_answers(
        answers,
        [Answer(question_id=81, answer_id="a", model_id="gpt", choices=(Choice(index=0, turns=("x",)),), tstamp=1.0)],
    )
    before = contents(place)
    refused(["answers", answers], answers.parent, "is the input", "--overwrite")
    check_output(answers, outputs.ANSWERS)
    judged = place / "judged"
    judged.mkdir()
    (judged / "replies.jsonl").write_text('{"mine": 1}\nthe last line, which a journal would cut off')
    refused(["judge", answers, "--model", "gpt-4"], judged, "is not a judge's replies")
    swept = place / "swept"
    swept.mkdir()
    (swept / "sweep.json").write_text('{"mine": 1}')
    refused(
        ["sweep", "smollm2", "--model", f"HuggingFaceTB/SmolLM2-135M-Instruct={place / 'llama'}"],
        swept,
        "not a sweep's plan",
    )
    assert {path: held for path, held in contents(place).items() if path in before} == before


def test_the_marks_of_each_kind_are_those_that_are_written(tmp_path):
    """outputs.py knows no torch: what it looks for is said twice, and here compared."""
    assert outputs.LOG.holds(",".join(_COLUMNS).encode(), tmp_path)
    for kind, name in ((outputs.PIVOT, PIVOT_FORMAT), (outputs.CODEBOOK, LEVELS_FORMAT)):
        header = json.dumps({"__metadata__": {"format": name}}).encode()
        (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
        check_output(tmp_path / "x", kind)
        other = outputs.CODEBOOK if kind is outputs.PIVOT else outputs.PIVOT
        with pytest.raises(ConfigError, match=f"is not {other.name}"):
            check_output(tmp_path / "x", other)
    (tmp_path / "p.json").write_text(json.dumps({"format": PREFIX_FORMAT, "tokens": [1]}, indent=1))
    check_output(tmp_path / "p.json", outputs.PREFIX)
    for table in sorted((REFERENCE.parent).glob("*.md")):
        if table.read_text().startswith("| model | weights"):
            check_output(table, outputs.TABLES["md"])
    for text in (b"", b"\x00" * 7, b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}", b"\x02" + b"\x00" * 7 + b"[]"):
        assert not outputs.PIVOT.holds(text, Path(__file__))
