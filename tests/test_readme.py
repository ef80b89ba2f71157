"""Law 13: every README command runs, its links lead somewhere, and its table is the records'."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from intactkv_eval.cell.arguments import KEYS, cell_from_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
CELL = cell_from_args({"pretrained": "m"})
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def runnable(tool):
    return [command for command in COMMANDS if shlex.split(command)[0] == tool]


def test_every_command_is_of_a_kind_that_a_test_runs():
    assert {shlex.split(command)[0] for command in COMMANDS} <= {"make", "pip", "lm_eval", "intactkv"}
    assert runnable("lm_eval")
    assert runnable("intactkv")


def test_make_targets_exist():
    targets = [shlex.split(command)[1] for command in runnable("make")]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_pip_extras_name_what_exists():
    """Those of the whole README, in lines of commands and in sentences."""
    extras = {extra for part in re.findall(r"\[([a-z,]+)\](?!\()", README) for extra in part.split(",")}
    known = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    assert {"figures", "judge", "ray"} <= extras & known
    assert extras <= known


@pytest.fixture
def small_wikitext(tmp_path):
    """A mirror with a few paragraphs in WikiText's layout: the commands run as written, offline and in seconds."""
    folder = tmp_path / "mirror" / "Salesforce" / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    rows = [{"text": "The river rises in the hills and runs to the sea . " * 20} for _ in range(6)]
    Dataset.from_list(rows).to_parquet(folder / "wikitext-2-raw-v1" / "test.parquet")
    files = [{"split": "test", "path": "wikitext-2-raw-v1/test.parquet"}]
    card = {"configs": [{"config_name": "wikitext-2-raw-v1", "data_files": files}]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    return tmp_path / "mirror"


@pytest.mark.slow
def test_the_commands_in_their_order(smollm2, tmp_path, small_wikitext):
    """As written, but for the model (the demo's, offline), shorter windows, a limit, and where the output goes."""
    env = {**os.environ, "INTACTKV_DATA": str(small_wikitext), "INTACTKV_CACHE": str(smollm2.parent.parent)}
    for command in [line for line in COMMANDS if shlex.split(line)[0] in {"lm_eval", "intactkv"}]:
        words = shlex.split(command.replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(smollm2)))
        if words[0] == "lm_eval" or words[1] == "eval":
            words += ["--limit", "8", "--device", "cpu", "--metadata", "ppl_window=128"]
        words = [f"pretrained={smollm2},{word}" if word.startswith("config=") else word for word in words]
        words = [str(ROOT / "tasks") if word == "tasks" and words[0] == "lm_eval" else word for word in words]
        words = [str(ROOT / word) if word.startswith("tasks/") else word for word in words]
        done = subprocess.run(
            [str(BIN / words[0]), *words[1:]], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr[-3000:])
        if "report" in words:
            rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| SmolLM2")]
            assert [row[3] for row in rows] == ["none", "bos"]
            assert "±" in rows[1][5]


def test_every_key_of_a_cell_is_in_the_table():
    """With a value that is not the default, where the sentence names one."""
    table = [line for line in README.splitlines() if line.startswith("| `")]
    for key, place in KEYS.items():
        row = next((line for line in table if f"`{key}`" in line.split("|")[1]), None)
        if key in {"revision", "dtype", "act_scheme"}:  # as hf has them; of a checkpoint
            continue
        assert row, key
        default = getattr(getattr(CELL, place.part) if place.part else CELL, place.field)
        named = set(re.findall("`(true|false)`", row))
        if isinstance(default, bool) and named:
            assert str(not default).lower() in named, f"{key}: {row}"


def test_links():
    targets = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README)
    assert len(targets) > 10
    for target in targets:
        assert (ROOT / target).exists(), target


def test_the_generated_tables_are_the_records(tmp_path):
    """The tables in results/, and the one of README.md, are what the report makes of the records (`make results`)."""
    made = re.findall(r"intactkv report (.+) --out (results/\S+)", (ROOT / "Makefile").read_text())
    assert len(made) == 3
    tables = {}
    for folders, name in made:
        out = tmp_path / Path(name).name
        subprocess.run([str(BIN / "intactkv"), "report", *folders.split(), "--out", str(out)], cwd=ROOT, check=True)
        tables[name] = out.read_text()
        assert (ROOT / name).read_text() == tables[name]
    made = re.findall(r"trained_pivots.py table (\S+) (results/\S+)", (ROOT / "Makefile").read_text())
    assert len(made) == 2
    for folder, name in made:
        out = tmp_path / Path(name).name
        subprocess.run([sys.executable, "scripts/trained_pivots.py", "table", folder, str(out)], cwd=ROOT, check=True)
        tables[name] = out.read_text()
        assert (ROOT / name).read_text() == tables[name]
    said = (ROOT / "docs/pivots.md").read_text()
    trained = tables["results/calibrated.md"] + tables["results/calibrated_awq.md"]
    shown = trained + tables["results/pivots.md"].partition("Other pivots")[2]
    assert all(line in said for line in shown.splitlines() if line.startswith("|"))
    quoted = [line for line in (ROOT / "docs/quantizers.md").read_text().splitlines() if line.startswith("|")]
    assert len(quoted) > 50
    assert set(quoted) <= set(tables["results/quantizers.md"].splitlines())
    for line in tables["results/README.md"].splitlines():
        if line.startswith("|"):
            assert line in README
