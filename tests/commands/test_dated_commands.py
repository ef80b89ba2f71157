"""The date of chat prompts in the commands, and in sweeps that go on on another day."""

import json

import pytest
import yaml
from helpers.tiny import build_model
from transformers.utils import chat_template_utils
from typer.testing import CliRunner

from intactkv_eval.assemble import chat_date
from intactkv_eval.cli.main import app
from intactkv_eval.errors import ConfigError
from intactkv_eval.pivot.kv import PivotKV, head_of_file
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.grid import expand
from intactkv_eval.sweep.runner import RunLocation, Sweep
from intactkv_eval.sweep.spec import RunSpec, read_sweep
from intactkv_eval.sweep.work import SweepWorker, WorkerSlot
from intactkv_eval.training.trainer import Trainer

DATED = (
    "{{ bos_token }}Today is {{ strftime_now('%d %b %Y') }}.\n{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def dated(tokenizer, tmp_path):
    """A folder of a model whose chat template writes the date."""
    folder = tmp_path / "dated"
    build_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(DATED)
    return folder


@pytest.fixture
def clock(monkeypatch):
    class Clock(chat_template_utils.datetime):
        day = 28

        @classmethod
        def now(cls, tz=None):
            return chat_date.datetime(2026, 11, cls.day, 9)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    return Clock


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def text_of(tokenizer, path):
    return tokenizer.decode(PivotKV.load(path).token_ids)


def test_capture_takes_the_date(dated, tokenizer, tmp_path):
    out = tmp_path / "head.safetensors"
    options = [dated, "--out", out, "--pivot", "prompt", "--dtype", "float32"]
    result = run("capture", *options, "--chat-date", "2025-01-31")
    assert result.exit_code == 0, result.exception
    assert "Today is 31 Jan 2025." in text_of(tokenizer, out)
    assert head_of_file(out).date == "2025-01-31"
    assert "chat_date='tomorrow'" in str(run("capture", *options, "--chat-date", "tomorrow").exception)


def test_quantize_takes_the_date_and_goes_on_with_it(dated, clock, tmp_path):
    (tmp_path / "text.txt").write_text("some prose to calibrate on " * 40)
    options = [dated, "--method", "gptq", "--bits", 4, "--group-size", 32, "--data", tmp_path / "text.txt",
               "--samples", 2, "--length", 16, "--dtype", "float32", "--pivot", "prompt"]  # fmt: skip

    def recorded(name, *more):
        result = run("quantize", *options, "--out", tmp_path / name, *more)
        assert result.exit_code == 0, result.exception
        return json.loads((tmp_path / name / "config.json").read_text())["intactkv_quantize"]

    today, yesterday = recorded("today"), recorded("yesterday", "--chat-date", "2026-11-27")
    assert (today["chat_date"], yesterday["chat_date"]) == ("2026-11-28", "2026-11-27")
    assert today["pivot_tokens"] != yesterday["pivot_tokens"]
    clock.day = 29
    again = recorded("again", "--chat-date", "2026-11-28")
    assert again["pivot_tokens"] == today["pivot_tokens"]
    refused = run("quantize", *options[:-2], "--out", tmp_path / "no", "--chat-date", "2026-11-28")
    assert "does nothing without --pivot prompt" in str(refused.exception)


def test_calibration_trains_on_prompts_of_its_date_and_names_it_when_it_goes_on(
    dated, clock, tokenizer, tmp_path, monkeypatch
):
    rows = [[("user", f"say {n}"), ("assistant", f"well, {n} it is")] for n in range(6)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows]
    (tmp_path / "talks.jsonl").write_text("\n".join(lines))
    cell = f"pretrained={dated},dtype=float32,weights=rtn,bits=3,group_size=32,pivot=prompt"

    def calibrate(cell, out):
        options = [
            "--data",
            tmp_path / "talks.jsonl",
            "--epochs",
            1,
            "--batch-size",
            4,
            "--min-assistant-tokens",
            3,
            "--max-tokens",
            90,
        ]
        return run("calibrate", "--model_args", cell, "--out", tmp_path / out, *options)

    first = tmp_path / "first.safetensors"
    assert calibrate(cell, first).exit_code == 0
    trained = PivotKV.load(first)
    assert trained.fingerprint.calibrated.settings["chat_date"] == trained.head.date == "2026-11-28"
    clock.day = 29
    on = calibrate(f"pretrained={dated},dtype=float32,weights=rtn,bits=3,group_size=32,pivot={first}", "on.safetensors")
    assert on.exit_code == 0, on.exception
    assert "28 Nov 2026" in text_of(tokenizer, tmp_path / "on.safetensors")

    class Killed(Exception):
        pass

    def killed(self, batch, bar):
        raise Killed

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "_step", killed)
        assert isinstance(calibrate(cell, "killed.safetensors").exception, Killed)
    clock.day = 30
    resumed = calibrate(cell, "killed.safetensors")
    assert isinstance(resumed.exception, ConfigError)
    assert "repeat that one with chat_date=2026-11-29 to go on with it" in str(resumed.exception)
    assert calibrate(f"{cell},chat_date=2026-11-29", "killed.safetensors").exit_code == 0


def qa_units(model, folder):
    task = {"task": "intactkv_demo_qa", "limit": 2, "apply_chat_template": True}
    entry = {"pretrained": str(model), "dtype": "float32"}
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({"models": [entry], "tasks": [task], "pivots": ["none", "prompt"]}))
    return Sweep(file, folder / "out", {})


def test_a_sweep_that_goes_on_on_another_day_has_one_date(dated, clock, tmp_path, monkeypatch):
    sweep = qa_units(dated, tmp_path)
    given = []
    monkeypatch.setattr("intactkv_eval.sweep.runner.run_units", lambda units, *rest: given.extend(units) or [])
    sweep.run(RunLocation(devices="cpu"))
    clock.day = 29
    sweep.run(RunLocation(devices="cpu"))
    assert {unit.begun for unit in given} == {"2026-11-28T09:00:00"}
    assert {unit.key for unit in given} == {unit.key for unit in sweep.units}, "the date is no part of the key"
    with SweepWorker(RunSpec()) as workshop:
        for number, unit in enumerate(given[2:]):
            out = tmp_path / f"unit{number}"
            workshop.run(unit, WorkerSlot("cpu", tmp_path / "made"), out)
            (file,) = out.rglob("results_*.json")
            record = json.loads(file.read_text())["config"]["intactkv"]
            assert record["chat_date"] == "2026-11-28"
            assert ("28" in "".join(record["pivot_text"])) == (unit.cell.pivot.source == "prompt")
    (sweep.folder.path / "begun.json").write_text('{"begun": "yesterday"}')
    with pytest.raises(ConfigError, match=r"begun.json: is damaged"):
        SweepFolder(sweep.folder.path).begun("2026-11-28")


def test_a_sweep_takes_a_date_for_its_pivots(dated, tmp_path):
    sweep = read_sweep(
        yaml.safe_dump({"models": [str(dated)], "tasks": ["intactkv_demo_qa"],
                        "pivots": [{"pivot": "prompt", "chat_date": "2025-01-31"}]}), "x"
    )  # fmt: skip
    (unit,) = expand(sweep)
    assert unit.cell.pivot.chat_date == "2025-01-31"
