"""Real sweeps of the small llama in real processes: what is shared, what fails, what is killed and resumed."""

import json
import os
import random
import signal
import time

import psutil
import pytest
from helpers.grids import RTN, TASK, grid, sweep_of
from helpers.running import command, figures, processes_of, wait_for

from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.commands.evaluate import run_lm_eval
from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.evaluate_task import evaluate_task
from intactkv_eval.report.collect import collect, read_run
from intactkv_eval.report.planned import absent_of
from intactkv_eval.report.tables import FORMATS, markdown
from intactkv_eval.sweep.folder import SweepFolder
from intactkv_eval.sweep.runner import RunLocation

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 40


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_shelf_changes_no_figure(saved_llama, tmp_path):
    """The same cells with shared models, and each for itself."""
    rotated, stages = {**RTN, "rotate": True, "act_bits": 8}, {"act_bits": 4}
    cells = [
        {"pivot": "none"}, {"pivot": "bos"}, {"pivot": "bos", "kv_bits": 3}, {"pivot": "none", **RTN},
        {"pivot": "bos", **RTN}, {"pivot": "bos", **rotated}, {"pivot": "none", **stages}, {"pivot": "bos"},
    ]  # fmt: skip

    def run(name, models=None):
        for place, cell in enumerate(cells):
            arguments = {"pretrained": str(saved_llama), **cell}
            out, settings = tmp_path / name / str(place), {"limit": 4, "device": "cpu"}
            evaluate_task(arguments, "intactkv_demo_ppl", out, None, {"ppl_window": 64}, models, **settings)
        return figures(tmp_path, name)

    alone = run("alone")
    models = ModelCache()
    assert run("shared", models) == alone
    assert (models.loads, models.derivations) == (1, 5), (
        "the last cell is the first again: nothing that was made is kept"
    )


@pytest.mark.slow
def test_a_cell_is_what_the_command_gives(saved_llama, tmp_path):
    cell = {"pivot": "bos", **RTN, "kv_bits": 3}
    settings = {"limit": 4, "device": "cpu"}
    arguments = {"pretrained": str(saved_llama), **cell}
    evaluate_task(arguments, "intactkv_demo_ppl", tmp_path / "one" / "0", 7, {"ppl_window": 64}, **settings)
    flags = ["--tasks", "intactkv_demo_ppl", "--metadata", '{"ppl_window": 64}', "--limit", "4", "--log_samples"]
    said = ",".join(f"{key}={value}" for key, value in arguments.items())
    out = str(tmp_path / "command" / "0")
    run_lm_eval(["--model_args", said, *flags, "--seed", "7", "--output_path", out])
    one, other = (read_run(next((tmp_path / name).rglob("results_*.json"))) for name in ("one", "command"))
    assert one.identity == other.identity
    assert one.scores == other.scores
    assert figures(tmp_path, "one") == figures(tmp_path, "command")


def test_a_sweep_runs_reports_and_skips(saved_llama, tmp_path, text):
    gptq = {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "data": text, "samples": 4, "length": 64}}
    levels = {"kv_bits": 2, "kv_scheme": "pre_rope", "codebook": {"data": text, "samples": 4, "length": 64}}
    given = grid(saved_llama, weights=[{}, gptq], kv=[{}, levels])
    sweep = sweep_of(given, tmp_path)
    ended = sweep.run(RunLocation())
    assert [end.error for end in ended] == [None] * 8
    assert len(list((tmp_path / "out" / "made").glob("[gk]*"))) == 3, "a checkpoint, two files of levels"
    runs, _ = collect([tmp_path / "out"])
    table = markdown(runs)
    assert "Not compared" not in table
    assert table.count("| llama | gptq w3g32") == 4
    baseline = next(line for line in table.splitlines() if "gptq w3g32" in line and "| none |" in line)
    assert baseline.split("|")[7].strip(), "a checkpoint's baseline has its loss to full precision"
    before = figures(tmp_path / "out")
    assert sweep_of(given, tmp_path).run(RunLocation()) == []
    more = sweep_of({**given, "seeds": [3]}, tmp_path)
    assert len(more.waiting) == 8
    assert figures(tmp_path / "out") == before


@pytest.mark.slow
def test_a_trained_pivot_and_a_response_cache(saved_llama, tmp_path):
    talks = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n} {TEXT}"[:50]}] for n in range(12)
    ]
    data = tmp_path / "talks.jsonl"
    data.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    trained = {
        "pivot": "bos",
        "calibrate": {"data": str(data), "max_tokens": 96, "min_assistant_tokens": 10, "batch_size": 4, "epochs": 1},
    }
    given = grid(saved_llama, weights=[RTN], pivots=["none", "bos", trained], run={"use_cache": True})
    assert [end.error for end in sweep_of(given, tmp_path).run(RunLocation())] == [None] * 3
    assert len(list((tmp_path / "out" / "made").glob("calibrated-*.safetensors"))) == 1
    assert not list((tmp_path / "out" / "responses").iterdir()), "what a cell that is done had answered is not kept"
    assert "Not compared" not in markdown(collect([tmp_path / "out"])[0])


def test_a_failed_cell_is_kept_as_such(saved_llama, tmp_path, text):
    """A cell of the user's fault, one whose preparation fails, and one that breaks lm_eval; the rest goes on."""
    windows = {"samples": 4, "length": 64}
    broken = {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "data": "nowhere.txt", **windows}}
    given = grid(saved_llama, weights=[{}, broken, {"weights": "rtn", "bits": 3, "group_size": 48}])
    given["tasks"] = [TASK, {**TASK, "limit": 3, "metadata": {"ppl_window": "wide"}}]
    sweep = sweep_of(given, tmp_path)
    ended = {end.unit.label: end.error for end in sweep.run(RunLocation())}
    done = [label for label, error in ended.items() if error is None]
    assert len(ended) == 12
    assert len(done) == 2
    assert all(" | fp | " in label for label in done)
    assert any("nowhere.txt" in error for error in ended.values() if error)
    assert any("which an earlier cell needed too, could not be made" in error for error in ended.values() if error)
    assert any("48" in error for error in ended.values() if error)
    runs, _ = collect([tmp_path / "out"])
    absent = absent_of([tmp_path / "out"])
    assert [one.word for one in absent] == ["failed"] * 10
    for make in FORMATS.values():
        assert make(runs, absent) == make(runs, absent)
        assert "failed" in make(runs, absent) or make is FORMATS["tex"]
    assert "| llama | gptq w3g32 | 16 | none | failed |" in markdown(runs, absent).replace(" act-order", "")
    (tmp_path / "nowhere.txt").write_text(TEXT)
    assert len(sweep_of(given, tmp_path).waiting) == 10, "what failed is tried again"


@pytest.mark.parametrize(
    "record", ["", "{}", "null", '"x"', "[" * 5000, *(f'{{"seconds": {one}}}' for one in ("NaN", "-1", "1e999", "[]", "9" * 500))],
    ids=range(10),
)  # fmt: skip
def test_a_damaged_record_is_an_unknown_duration(saved_llama, tmp_path, record):
    """A dry run ended in a traceback, or said `about nan h`."""
    sweep = sweep_of(grid(saved_llama), tmp_path)
    for unit in sweep.units[:2]:
        sweep.folder.start(unit.key)
        sweep.folder.place(unit.key, {"seconds": 120.0})
    assert "about 4 min" in sweep.dry_run(1)
    (sweep.folder.cell(sweep.units[0].key) / "record.json").write_text(record)
    assert "about 4 min" in sweep.dry_run(1), "by the other"
    (sweep.folder.cell(sweep.units[1].key) / "record.json").write_text(record)
    assert "no estimate" in sweep.dry_run(1)


def test_one_sweep_a_folder(saved_llama, tmp_path):
    sweep = sweep_of(grid(saved_llama), tmp_path)
    with SweepFolder(tmp_path / "out").alone(), pytest.raises(ConfigError, match="another sweep works on it"):
        sweep.run(RunLocation())
    with pytest.raises(ConfigError, match="use cpu, cuda:0"):
        sweep.run(RunLocation(devices="gpu"))


def test_results_that_the_grid_no_longer_holds_are_not_reported(saved_llama, tmp_path):
    sweep_of(grid(saved_llama, weights=[{}]), tmp_path).run(RunLocation())
    assert len(collect([tmp_path / "out"])[0]) == 2
    changed = sweep_of(grid(saved_llama, weights=[{}], tasks=[{**TASK, "limit": 3}]), tmp_path)
    changed.run(RunLocation())
    runs, _ = collect([tmp_path / "out"])
    assert {run.scores["intactkv_demo_ppl"].settings["limit"] for run in runs} == {3.0}
    assert len(figures(tmp_path / "out")) == 4, "they are kept"


@pytest.mark.slow
def test_killed_five_times_it_ends_as_if_undisturbed(saved_llama, tmp_path, text):
    gptq = {"quantize": {"method": "gptq", "bits": 3, "group_size": 32, "data": text, "samples": 4, "length": 64}}
    kv = [{}, {"kv_bits": 4}, {"kv_bits": 3}, {"kv_bits": 2}]
    given = grid(saved_llama, weights=[{}, RTN, gptq], kv=kv)
    calm = tmp_path / "calm"
    calm.mkdir()
    assert all(end.error is None for end in sweep_of(given, calm).run(RunLocation()))
    sweep_of(given, tmp_path)
    draw = random.Random(0)
    for kill in range(5):
        process = command(tmp_path)
        wait_for(4 * kill, tmp_path, process)
        time.sleep(draw.uniform(0, 3))
        others = processes_of(process)[1:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        _, left = psutil.wait_procs(others, timeout=20)
        assert not left, "workers end with the sweep"
    last = command(tmp_path)
    said = last.communicate()[0].decode()
    assert last.returncode == 0, said
    assert "24 of 24 cells done, 0 failed" in said
    assert figures(tmp_path / "out") == figures(calm / "out")
    assert len(figures(calm / "out")) == 24


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(saved_llama, tmp_path):
    given = grid(saved_llama, kv=[{}, {"kv_bits": 4}, {"kv_bits": 3}])
    sweep_of(given, tmp_path)
    process = command(tmp_path, "--devices", "cpu,cpu")
    wait_for(3, tmp_path, process)
    workers = [one for one in processes_of(process)[1:] if "spawn_main" in " ".join(one.cmdline())]
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    said = process.communicate()[0].decode()
    assert process.returncode == 0, said
    assert "12 of 12 cells done, 0 failed" in said
    runs = [read_run(path) for path in (tmp_path / "out").rglob("results_*.json")]
    assert len(runs) == 12
