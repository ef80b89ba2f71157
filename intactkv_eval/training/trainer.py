"""Training the pivot's rows: AdamW at a constant rate, batches gathered example by example, stopped early, resumed.

    an epoch: all training examples once, in an order drawn from (seed, epoch)
    a step:   the mean gradient of `batch` examples, clipped to a norm, then AdamW without weight decay
    kept:     the rows of the epoch with the least held-out loss

What a killed run has saved is enough to go on to the same result. Several processes share the examples of each batch.
Source: IntactKV, section 3.3 and the settings of its released code.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.training.distributed import Ranks
from intactkv_eval.training.examples import Example
from intactkv_eval.training.run_state import RunState
from intactkv_eval.training.student import Quality, Student, Targets


@dataclass(frozen=True)
class TrainingArguments:
    """How rows are trained.

    Args:
        learning_rate: The constant learning rate of AdamW.
        batch_size: Examples of a step.
        epochs: The largest number of epochs.
        max_grad_norm: The norm to which a step's gradient is clipped; 0 for no clipping.
        held_out: The share of examples that is never trained on.
        patience: Epochs without a better held-out loss before training ends.
        seed: Of what is held out, and of the order.

    Raises:
        ConfigError: For a value out of its range.
    """

    learning_rate: float = 2e-4
    batch_size: int = 16
    epochs: int = 20
    max_grad_norm: float = 0.3
    held_out: float = 0.2
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        smallest = {"learning_rate": 0.0, "batch_size": 1, "epochs": 1, "max_grad_norm": 0.0, "patience": 1}
        for name, least in smallest.items():
            value = getattr(self, name)
            if not math.isfinite(value) or value < least or (name == "learning_rate" and value <= 0):
                flag, none = name.replace("_", "-"), " or 0 for none" * (name == "max_grad_norm")
                raise ConfigError(f"--{flag} {value}: use a number above 0{none}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"--held-out {self.held_out}: the share that is held out lies between 0 and 1")


def split(examples: int, settings: TrainingArguments) -> tuple[list[int], list[int]]:
    """The places of the examples that are trained on, and of those held out. Raises ConfigError for less than two."""
    if examples < 2:
        raise ConfigError(f"calibration: {examples} example; one at least is trained on and one held out")
    order = list(range(examples))
    random.Random(f"held out {settings.seed}").shuffle(order)
    count = min(max(round(examples * settings.held_out), 1), examples - 1)
    return sorted(order[count:]), sorted(order[:count])


TargetsOf = Callable[[int], Targets]
"""The place of an example -> what the full-precision model makes of it."""


class Trainer:
    """Trains the rows of `student` on `examples`, and remembers the best of them in `state`."""

    def __init__(
        self, student: Student, examples: Sequence[Example], targets: TargetsOf, settings: TrainingArguments,
        state: RunState, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self._student, self._examples, self._targets = student, examples, targets
        self._settings, self._state, self._ranks = settings, state, ranks or Ranks()
        self._training, self._held_out = split(len(examples), settings)
        self._parameters = student.rows.parameters()
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.learning_rate, weight_decay=0.0)

    def run(self) -> tuple[Quality, Quality]:
        """Train to the end; the rows are then the best ones. The held-out quality before, and with these rows.

        Raises PivotError where a gradient is not finite.
        """
        state, settings = self._state, self._settings
        state.resume(self._parameters, self._optimizer)
        if state.first is None:
            state.first = self.held_out_quality()
            state.keep_best(state.first, self._parameters, 0)
            state.log({"epoch": 0, "step": 0, **_named(state.first)})
            state.save(self._parameters, self._optimizer)
        for epoch in range(state.epoch, settings.epochs):
            if state.epochs_without_gain >= settings.patience:
                break
            self._epoch(epoch)
            quality = self.held_out_quality()
            state.end_epoch(epoch, quality, self._parameters)
            state.save(self._parameters, self._optimizer)
        assert state.first is not None
        assert state.best is not None
        self._student.rows.restore(state.best_rows)
        return state.first, state.best

    def held_out_quality(self) -> Quality:
        """Of the rows as they are now."""
        chosen = self._held_out
        found = self._student.quality([self._examples[i] for i in chosen], (self._targets(i) for i in chosen))
        return Quality(*self._ranks.firsts(found, self._parameters[0].device))

    def _epoch(self, epoch: int) -> None:
        settings, state = self._settings, self._state
        order = list(self._training)
        random.Random(f"{settings.seed} {epoch}").shuffle(order)
        batches = [order[start : start + settings.batch_size] for start in range(0, len(order), settings.batch_size)]
        bar = tqdm(total=len(order), desc=f"Calibrating, epoch {epoch + 1}/{settings.epochs}", disable=not state.writes)
        bar.update(min(state.batch * settings.batch_size, len(order)))
        for number in range(state.batch, len(batches)):
            loss = self._step(batches[number], bar)
            state.end_step(epoch, number, loss)
            bar.set_postfix(loss=f"{loss:.4g}")
            if state.due():
                state.save(self._parameters, self._optimizer)
        bar.close()

    def _step(self, batch: list[int], bar: Any) -> float:
        self._optimizer.zero_grad()
        losses = []
        for place in self._ranks.mine(batch):
            losses.append(self._student.add_gradient(self._examples[place], self._targets(place), 1 / len(batch)).sum())
            bar.update(1)
        total = self._ranks.summed(self._parameters, losses)
        norm = _norm(self._parameters)
        if not math.isfinite(norm):
            raise PivotError(
                "calibration: the gradient is not finite; train with dtype=bfloat16 or float32, or a smaller "
                "--learning-rate"
            )
        if self._settings.max_grad_norm and norm > self._settings.max_grad_norm:
            for parameter in self._parameters:
                assert parameter.grad is not None
                parameter.grad.mul_(self._settings.max_grad_norm / norm)
        self._optimizer.step()
        bar.update(len(batch) - len(losses))
        return total / len(batch)


def _norm(parameters: Sequence[Tensor]) -> float:
    """Of all gradients together, wherever their layers are."""
    return math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))


def _named(quality: Quality) -> dict[str, float]:
    return {f"held_out_{name}": value for name, value in quality._asdict().items()}
