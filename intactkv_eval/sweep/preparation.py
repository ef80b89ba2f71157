"""What is made once for many cells: a quantized checkpoint, a codebook of the KV cache, a trained pivot.

A preparation is a value; `make` does it, in this process, into a folder where all of a sweep's lie. Its name holds the
digest of all that decides its bytes. Processes that need the same one wait for each other, and a killed one goes on
where it was, since the makers themselves do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from intactkv_eval.cell.formulas import current, names_of_job
from intactkv_eval.commands.calibrate import CalibrateOptions, calibrate_to_file
from intactkv_eval.commands.kv_codebook import CodebookOptions, codebook_of_text
from intactkv_eval.commands.quantize import Source, quantize_to_folder
from intactkv_eval.lm.hf_arguments import split_model_args
from intactkv_eval.quantize.job import Job, job_from
from intactkv_eval.storage.files import locked
from intactkv_eval.sweep.identity import key_of
from intactkv_eval.sweep.spec import CalibrateSpec, CodebookSpec, QuantizeSpec
from intactkv_eval.training.trainer import TrainingArguments

MADE = "@made/"
"""Stands for the folder where preparations lie, which each machine has its own of."""
_OF_CALIBRATION = ("calibration", "calibration.vicuna", "chat")
_BESIDE = {"format", "dtype", "options", "preset"}


@dataclass(frozen=True)
class QuantizePreparation:
    """`intactkv quantize` of `model`."""

    model: Mapping[str, Any]
    asked: QuantizeSpec

    def job(self) -> Job:
        """Raises ConfigError for an option that is unknown or does nothing."""
        options = [f"{key}={value}" for key, value in self.asked.options.items()]
        return job_from(self.asked.model_dump(exclude=_BESIDE), options, self.asked.preset)

    @property
    def name(self) -> str:
        """The folder of the checkpoint."""
        job = self.job()
        said = {"model": self.model, "job": job.model_dump(), "format": self.asked.format, "dtype": self._dtype}
        said["formulas"] = current(names_of_job(job.model_dump(mode="json")))
        return f"{job.method}-w{job.bits}{_group(job)}-{key_of(said)}"

    @property
    def label(self) -> str:
        """For people: preset or method, bits, the options that are given, and behind which pivot it is calibrated."""
        job = self.job()
        rotated = " rotated" if job.rotate and not self.asked.preset else ""
        act = "" if job.activations.bits == 16 else f" a{job.activations.bits}"
        pivot = job.calibration.pivot if job.calibration is not None else None
        behind = "" if pivot is None else f" behind {pivot.source}"
        own = "".join(f" {key}={value}" for key, value in self.asked.options.items())
        return f"{self.asked.preset or job.method}{rotated} w{job.bits}{_group(job)}{act}{own}{behind}"

    @property
    def _dtype(self) -> str:
        return str(self.asked.dtype or self.model.get("dtype") or "auto")

    def make(self, out: Path, device: str) -> None:
        """Raises IntactKVError."""
        trusted = bool(self.model.get("trust_remote_code", False))
        revision = str(self.model.get("revision", "main"))
        source = Source(str(self.model["pretrained"]), self._dtype, revision, trusted, device)
        quantize_to_folder(source, out, self.asked.format, self.job())


@dataclass(frozen=True)
class CodebookPreparation:
    """`intactkv kv-codebook` for cells of `model` behind `pivot`."""

    model: Mapping[str, Any]
    pivot: Mapping[str, Any]
    bits: int
    sink_tokens: int
    quantize_pivot: bool
    asked: CodebookSpec

    @property
    def name(self) -> str:
        """The file of the codebook."""
        said = {"model": self.model, "pivot": self.pivot, "bits": self.bits}
        said |= {"sink_tokens": self.sink_tokens, "quantize_pivot": self.quantize_pivot}
        return f"kv{self.bits}-{key_of({**said, **self.asked.model_dump(), **_made_by('codebook')})}.safetensors"

    def make(self, out: Path, device: str) -> None:
        """Raises IntactKVError."""
        cell, loading = split_model_args({**self.model, **self.pivot})
        asked, front = self.asked, (self.sink_tokens, self.quantize_pivot)
        options = CodebookOptions(asked.data, self.bits, asked.samples, asked.length, asked.seed, *front)
        codebook_of_text(cell, {**loading, "device": device}, options, out)


@dataclass(frozen=True)
class CalibratePreparation:
    """`intactkv calibrate` for the cell of `arguments`."""

    arguments: Mapping[str, Any]
    asked: CalibrateSpec

    @property
    def name(self) -> str:
        """The file of the trained pivot."""
        said = {"cell": self.arguments, **self.asked.model_dump(), **_made_by(*_OF_CALIBRATION)}
        return f"calibrated-{key_of(said)}.safetensors"

    def make(self, out: Path, device: str) -> None:
        """Raises IntactKVError."""
        cell, loading = split_model_args(placed(self.arguments, out.parent))
        given, of_training = (
            self.asked.model_dump(exclude_none=True),
            {field.name for field in fields(TrainingArguments)},
        )
        training = TrainingArguments(**{key: value for key, value in given.items() if key in of_training})
        options = CalibrateOptions(**{key: value for key, value in given.items() if key not in of_training})
        calibrate_to_file(cell, {**loading, "device": device}, options, training, out)


Preparation = QuantizePreparation | CodebookPreparation | CalibratePreparation


def placed(arguments: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The arguments with MADE as the folder that it stands for."""
    return {
        key: str(folder / value.removeprefix(MADE)) if isinstance(value, str) and value.startswith(MADE) else value
        for key, value in arguments.items()
    }


def prepare(preparation: Preparation, folder: Path, device: str) -> Path:
    """What the preparation makes, made now where `folder` does not hold it; one process at a time.

    Raises IntactKVError as its maker does.
    """
    out = folder / preparation.name
    with locked(folder / f".{preparation.name}.lock"):
        if not out.exists():
            preparation.make(out, device)
    return out


def _group(job: Job) -> str:
    return "" if job.group_size == -1 else f"g{job.group_size}"


def _made_by(*formulas: str) -> dict[str, Any]:
    """The part of a name by which files of two revisions of their formulas differ."""
    return {"formulas": current(formulas)}
