"""Training lowers the held-out loss; killed anywhere it ends with the same rows; several processes take the same steps."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_student import example, pair

from intactkv_eval.errors import CheckpointError, ConfigError, PivotError
from intactkv_eval.model.structure import layer_devices
from intactkv_eval.training.distributed import Ranks
from intactkv_eval.training.run_state import RunState
from intactkv_eval.training.student import Student
from intactkv_eval.training.teacher import layer_outputs
from intactkv_eval.training.trainable_kv import TrainedRows
from intactkv_eval.training.trainer import Trainer, TrainingArguments, split

EXAMPLES = [
    example(seed, 8 + seed % 3, words=9) for seed in range(12)
]  # of few words, so that they have much in common
SETTINGS = TrainingArguments(
    learning_rate=1e-2, batch_size=3, epochs=4, held_out=0.4
)  # 7 are trained on: steps of 3, 3 and 1


class Killed(Exception):
    """Stands for the signal."""


@pytest.fixture(scope="module")
def models():
    full, pivot, quantized, _ = pair("llama", torch.float32)
    return pivot, quantized, [layer_outputs(full, pivot, one) for one in EXAMPLES]


def trainer(models, folder, settings=SETTINGS, targets=None, ranks=None, job=None):
    pivot, quantized, kept = models
    rows = TrainedRows(pivot, torch.float32, layer_devices(quantized))
    state = RunState(folder, job or {"a": 1})
    return Trainer(Student(quantized, rows), EXAMPLES, targets or kept.__getitem__, settings, state, ranks), rows, state


def test_held_out_loss_falls_and_the_best_rows_are_kept(models, tmp_path):
    made, rows, state = trainer(models, tmp_path)
    before, after = made.run()
    assert after.blocks < 0.95 * before.blocks
    again = made.held_out_quality()
    assert again == after
    assert state.best_epoch > 0
    log = list(csv.DictReader((tmp_path / "log.csv").open()))
    losses = [float(line["loss"]) for line in log if line["loss"]]
    assert len(losses) == state.step == 3 * state.epoch
    assert float(log[0]["held_out_blocks"]) == before.blocks
    assert min(float(line["held_out_blocks"]) for line in log if line["held_out_blocks"]) == after.blocks
    assert all(torch.equal(a, b) for a, b in zip(rows.parameters(), state.best_rows, strict=True))


@pytest.mark.parametrize("after", [1, 3, 4, 8, 14])
def test_killed_anywhere_it_ends_with_the_same_rows(models, tmp_path, monkeypatch, after):
    """After so many gradients: before the first step is saved, in the middle of an epoch, in a later one."""
    monkeypatch.setattr("intactkv_eval.training.run_state._EVERY", 1)
    whole, rows, _ = trainer(models, tmp_path / "whole")
    quality = whole.run()
    real, count = Student.add_gradient, []

    def dying(self, *arguments):
        count.append(1)
        if len(count) == after:
            raise Killed
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "add_gradient", dying)
        with pytest.raises(Killed):
            trainer(models, tmp_path / "killed")[0].run()
    resumed, other, _ = trainer(models, tmp_path / "killed")
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(Student, "add_gradient", lambda self, *a: steps.append(1) or real(self, *a))
        assert resumed.run() == quality
    assert all(torch.equal(a, b) for a, b in zip(rows.parameters(), other.parameters(), strict=True))
    saved = [7 * epoch + step for epoch in range(4) for step in (0, 3, 6) if 7 * epoch + step < after]
    assert len(steps) == 4 * 7 - saved[-1]
    logs = [(tmp_path / name / "log.csv").read_text() for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_another_job_or_a_damaged_state_is_refused(models, tmp_path):
    trainer(models, tmp_path)[0].run()
    with pytest.raises(ConfigError, match=r"another job \(a differ\)"):
        trainer(models, tmp_path, job={"a": 2})
    (tmp_path / "state.pt").write_bytes(b"no state")
    with pytest.raises(CheckpointError, match="damaged"):
        trainer(models, tmp_path)


def test_it_stops_when_nothing_gets_better(models, tmp_path):
    """A rate that throws the rows far away: no epoch is better, so the first rows come back."""
    made, rows, state = trainer(
        models, tmp_path, TrainingArguments(learning_rate=50.0, batch_size=4, epochs=9, patience=2, held_out=0.3)
    )
    first = [parameter.detach().clone() for parameter in rows.parameters()]
    before, after = made.run()
    assert (before, state.best_epoch, state.epoch) == (after, 0, 2)
    assert all(torch.equal(a, b) for a, b in zip(rows.parameters(), first, strict=True))


def test_gradients_are_clipped_as_one(models, tmp_path):
    steps = {}
    for clip in (0.0, 1e-3):
        made, rows, _ = trainer(
            models,
            tmp_path / str(clip),
            TrainingArguments(learning_rate=1e-2, batch_size=3, epochs=1, max_grad_norm=clip, held_out=0.3),
        )
        made._step([0, 1, 2], type("Bar", (), {"update": lambda self, n: None})())
        steps[clip] = torch.cat([parameter.grad.flatten() for parameter in rows.parameters()])
    assert float(steps[1e-3].norm()) == pytest.approx(1e-3, rel=1e-5)
    torch.testing.assert_close(steps[1e-3] / 1e-3, steps[0.0] / steps[0.0].norm())


def test_a_steps_gradient_is_the_mean_of_its_examples(models, tmp_path):
    """Of the two that the last batch of an epoch has too, not of as many as a full one."""
    found = {}
    for places in ((0, 1), (0,), (1,)):
        settings = TrainingArguments(learning_rate=1e-2, batch_size=4, epochs=1, max_grad_norm=0.0, held_out=0.3)
        made, rows, _ = trainer(models, tmp_path / str(places), settings)
        made._step(list(places), type("Bar", (), {"update": lambda self, n: None})())
        found[places] = torch.cat([parameter.grad.flatten() for parameter in rows.parameters()])
    torch.testing.assert_close(found[0, 1], (found[0,] + found[1,]) / 2)


def test_tensorboard_is_told_each_step_once(models, tmp_path):
    """Its files lie beside the output, and what a killed process had told behind its last save is taken back."""
    pivot, quantized, kept = models
    for lost in (True, False):
        rows = TrainedRows(pivot, torch.float32, layer_devices(quantized))
        state = RunState(tmp_path / "state", {"a": 1}, tensorboard=tmp_path / "board")
        Trainer(Student(quantized, rows), EXAMPLES, kept.__getitem__, SETTINGS, state).run()
        if lost:
            state.log({"loss": 99.0, "step": state.step + 1})
        state.close()
    read = EventAccumulator(str(tmp_path / "board")).Reload()
    with (tmp_path / "state" / "log.csv").open() as file:
        logged = list(csv.DictReader(file))
    for name in ("loss", "held_out_blocks", "held_out_last", "held_out_nll"):
        expected = {int(row["step"]): float(row[name]) for row in logged if row[name]}
        found = read.Scalars(name)
        assert len(found) == len(expected) > 1
        assert {one.step: one.value for one in found} == pytest.approx(expected)


def test_a_gradient_that_is_no_number_ends_it(models, tmp_path):
    bad = [[layer * float("nan") for layer in one] for one in models[2]]
    made, *_ = trainer(models, tmp_path, targets=bad.__getitem__)
    with pytest.raises(PivotError, match="not finite"):
        made.run()


def test_split_and_settings():
    training, held_out = split(10, TrainingArguments(held_out=0.2))
    assert sorted(training + held_out) == list(range(10))
    assert len(held_out) == 2
    assert split(10, TrainingArguments(seed=1))[1] != held_out
    assert len(split(2, TrainingArguments(held_out=0.01))[1]) == 1
    with pytest.raises(ConfigError, match="held out"):
        split(1, TrainingArguments())
    for bad in (
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"batch_size": 0},
        {"epochs": 0},
        {"max_grad_norm": -1},
        {"held_out": 1.0},
        {"patience": 0},
    ):
        with pytest.raises(ConfigError, match=next(iter(bad)).replace("_", "-")):
            TrainingArguments(**bad)


def test_two_processes_take_the_steps_of_one(models, tmp_path):
    """Over gloo, with batches that do not divide and one that leaves a process nothing: gradients differ by the order
    of their sum alone, and the last batch's is no smaller for that.
    """
    made, rows, _ = trainer(models, tmp_path / "one")
    made.run()
    torch.save([parameter.detach() for parameter in rows.parameters()], tmp_path / "one.pt")
    code = Path(__file__).with_name("two_processes.py")
    path = os.pathsep.join([str(code.parent), str(code.parents[1]), *sys.path])
    ranks = [
        subprocess.Popen(
            [sys.executable, str(code), str(rank), str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    for one in ranks:
        assert one.wait(timeout=240) == 0, one.stderr.read()
    alone = torch.load(tmp_path / "one.pt")
    both = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for a, b, c in zip(alone, *both, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_ranks_share_a_batch():
    assert [list(Ranks(rank, 3).mine(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
