"""What a calibration has reached: saved whole, so that a killed run goes on to the same result, and logged as CSV.

In the folder: state.pt (rows, optimizer, place, best rows so far) and log.csv, whose lines beyond the saved place are
dropped when a run goes on. With TensorBoard installed and asked for, the log's numbers go there too.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.tensor_file import write_pickle
from intactkv_eval.storage.torch_pickle import read_torch_file
from intactkv_eval.training.student import Quality

_EVERY = 10  # steps between two saves inside of an epoch
_COLUMNS = ("epoch", "step", "loss", "held_out_blocks", "held_out_last", "held_out_nll")


class RunState:
    """The state of one run in `folder`. job: all that its result depends on. writes: this process saves and logs.
    tensorboard: a folder for its event files.

    Raises ConfigError where the folder holds a run of another job.
    """

    def __init__(
        self, folder: Path, job: Mapping[str, Any], writes: bool = True, tensorboard: Path | None = None
    ) -> None:
        self.folder, self.writes, self._job = folder, writes, json.dumps(job, sort_keys=True)
        self.epoch = self.batch = self.step = self.epochs_without_gain = self.best_epoch = 0
        self.first: Quality | None = None
        self.best: Quality | None = None
        self.best_rows: list[Tensor] = []
        self._rows: list[dict[str, Any]] = []
        self._saved = self._read()
        done = 0 if self._saved is None else int(self._saved["step"])
        self._board = _board(tensorboard, done) if tensorboard is not None and writes else None

    @property
    def log_path(self) -> Path:
        """The CSV."""
        return self.folder / "log.csv"

    def resume(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Put everything back where an earlier process stopped; nothing where there was none."""
        saved = self._saved
        if saved is None:
            return
        for name in ("epoch", "batch", "step", "epochs_without_gain", "best_epoch"):
            setattr(self, name, saved[name])
        self.first, self.best = Quality(*saved["first"]), Quality(*saved["best"])
        self.best_rows, self._rows = saved["best_rows"], saved["log"]
        with torch.no_grad():
            for held, one in zip(parameters, saved["rows"], strict=True):
                held.copy_(one)
        optimizer.load_state_dict(saved["optimizer"])

    def save(self, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> None:
        """Write all of it, whole or not at all."""
        assert self.first is not None
        assert self.best is not None
        names = ("epoch", "batch", "step", "epochs_without_gain", "best_epoch")
        content = {
            **{name: getattr(self, name) for name in names},
            "job": self._job, "first": tuple(self.first), "best": tuple(self.best), "best_rows": self.best_rows,
            "rows": [parameter.detach() for parameter in parameters], "optimizer": optimizer.state_dict(),
            "log": self._rows,
        }  # fmt: skip
        if self.writes:
            write_pickle(self.folder / "state.pt", content)
            write_atomic(self.log_path, self._write_log)

    def due(self) -> bool:
        """Whether enough steps went by to save again."""
        return self.step % _EVERY == 0

    def end_step(self, epoch: int, batch: int, loss: float) -> None:
        """One step is done."""
        self.step, self.batch = self.step + 1, batch + 1
        self.log({"epoch": epoch + 1, "step": self.step, "loss": loss})

    def end_epoch(self, epoch: int, quality: Quality, parameters: Sequence[Tensor]) -> None:
        """One epoch is done, and `quality` is that of its rows."""
        self.epoch, self.batch = epoch + 1, 0
        self.log({"epoch": epoch + 1, "step": self.step, **{f"held_out_{k}": v for k, v in quality._asdict().items()}})
        assert self.best is not None
        if quality.blocks < self.best.blocks:
            self.keep_best(quality, parameters, epoch + 1)
        else:
            self.epochs_without_gain += 1

    def keep_best(self, quality: Quality, parameters: Sequence[Tensor], epoch: int) -> None:
        """These rows are the best so far."""
        self.best, self.best_epoch, self.epochs_without_gain = quality, epoch, 0
        self.best_rows = [parameter.detach().clone() for parameter in parameters]

    def log(self, row: dict[str, Any]) -> None:
        """A line of the log."""
        self._rows.append(row)
        if self._board is not None:
            for name, value in row.items():
                if name not in {"epoch", "step"}:
                    self._board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """What TensorBoard was told is on disk."""
        if self._board is not None:
            self._board.close()

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)

    def _read(self) -> dict[str, Any] | None:
        path = self.folder / "state.pt"
        if not path.is_file():
            return None
        try:
            saved: dict[str, Any] = read_torch_file(path)
            other = saved["job"]
        except (CheckpointError, OSError, LookupError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged ({error}); remove {self.folder} to start anew") from None
        if other != self._job:
            ours, theirs = json.loads(self._job), json.loads(other)
            keys = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            dates = [one.get("settings", {}).get("chat_date") for one in (theirs, ours)]
            date = f" with chat_date={dates[0]}" if dates[0] is not None and dates[0] != dates[1] else ""
            raise ConfigError(
                f"{self.folder} holds an unfinished calibration of another job ({', '.join(keys)} differ): repeat that "
                f"one{date} to go on with it, or remove the folder"
            )
        return saved


def _board(folder: Path, done: int) -> Any:
    """purge_step: what a killed process had logged behind its last save is logged again."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - optional
    except ImportError:
        raise ConfigError("--tensorboard: pip install tensorboard") from None
    return SummaryWriter(str(folder), purge_step=done + 1 if done else None)
