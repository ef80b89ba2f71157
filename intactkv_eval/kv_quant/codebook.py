"""Codebook: the uneven levels that `pre_rope` calibrates, as a value and a file.

A file is one safetensors: `key_levels`, `value_levels` [L, 2**bits], `low.L`, `high.L` [H, D] for each layer L, and as
metadata the fingerprint of the model, the bits, and how it was calibrated. Knows no model.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from intactkv_eval.cell.formulas import current, recorded, stale
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.pivot.identity import Fingerprint
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.tensor_file import read_tensor_file, write_tensor_file

FORMAT = "intactkv-kv-codebook-1"
_FORMULA = "codebook"
_FIX = "the file is damaged or another model's. Calibrate anew: intactkv kv-codebook"


@dataclass(frozen=True)
class Calibration:
    """How levels were made. front: the token ids before every sample, of which the first `left_out` do not count.

    samples: a hash of the token ids that do. origin: where they are from, in words.
    """

    front: tuple[int, ...]
    left_out: int
    samples: str
    sequences: int
    tokens: int
    origin: str


@dataclass(frozen=True, eq=False)
class Codebook:
    """key_levels, value_levels: [L, 2**bits], sorted, in [-1, 1]. low, high: the range of each key channel [H, D].

    Raises ConfigError for tensors that do not fit together or are not finite.
    """

    bits: int
    key_levels: Tensor
    value_levels: Tensor
    low: tuple[Tensor, ...]
    high: tuple[Tensor, ...]
    fingerprint: Fingerprint
    calibration: Calibration

    def __post_init__(self) -> None:
        if self.bits not in range(2, 9) or not self.low:
            raise ConfigError(
                f"levels for {self.bits} bits of {len(self.low)} layers; expected 2 to 8 bits and a layer"
            )
        expected = (len(self.low), 2**self.bits)
        for name in ("key_levels", "value_levels"):
            found = getattr(self, name)
            if tuple(found.shape) != expected:
                raise ConfigError(f"{name} {tuple(found.shape)} should be {expected}: layers, 2**bits")
            if not (found.diff(dim=1) >= 0).all() or found.abs().max() > 1:
                raise ConfigError(f"{name} should be sorted numbers from -1 to 1")
        if len(self.low) != len(self.high):
            raise ConfigError(f"{len(self.low)} lower and {len(self.high)} upper ends of key channels")
        for layer, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if (
                low.ndim != 2
                or low.shape != high.shape
                or not (low <= high).all()
                or not torch.isfinite(high - low).all()
            ):
                raise ConfigError(
                    f"layer {layer}: the ranges of key channels should be finite, low <= high, both [H, D]"
                )

    @property
    def digest(self) -> str:
        """A hash of all numbers."""
        made = hashlib.sha256(f"{self.bits}".encode())
        for tensor in (self.key_levels, self.value_levels, *self.low, *self.high):
            made.update(tensor.contiguous().cpu().numpy().tobytes())
        return made.hexdigest()[:32]

    def record(self) -> dict[str, Any]:
        """What a run records of the levels that it used."""
        done = self.calibration
        return {
            "digest": self.digest,
            "samples": done.samples,
            "sequences": done.sequences,
            "tokens": done.tokens,
            "origin": done.origin,
            "left_out": done.left_out,
            "fingerprint": self.fingerprint.model_dump(exclude={"embedding_sample"}),
        }

    def check_calibrated(self, front: tuple[int, ...], exempt: int) -> None:
        """Raise ConfigError unless made behind these tokens, with the rows of the first `exempt` tokens left out."""
        done = self.calibration
        if (done.front, done.left_out) != (front, exempt):
            raise ConfigError(
                f"kv_codebook: calibrated behind tokens {list(done.front)} with the rows of the first {done.left_out} "
                f"left out; this cell has {list(front)} in front and {exempt} exempt rows, so other ranges. Calibrate "
                "as the cell runs: intactkv kv-codebook --pivot ... (--quantize-pivot, --sink-tokens)"
            )

    def check_fits(self, keys: Sequence[Tensor]) -> None:
        """Raise ConfigError unless there is a range for each channel of the keys [H, T, D] that each layer computes.

        Fewer heads would be stretched over all of them without a word.
        """
        if len(keys) != len(self.low):
            raise ConfigError(f"kv_codebook: of {len(self.low)} layers, this model caches keys in {len(keys)}: {_FIX}")
        for layer, (low, rows) in enumerate(zip(self.low, keys, strict=True)):
            expected = (rows.shape[0], rows.shape[2])
            if tuple(low.shape) != expected:
                raise ConfigError(
                    f"kv_codebook: layer {layer} has ranges for (heads, width) {tuple(low.shape)}, this model's "
                    f"keys there are {expected}: {_FIX}"
                )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically. Raises OSError as the file system does."""
        tensors = {"key_levels": self.key_levels.contiguous(), "value_levels": self.value_levels.contiguous()}
        for layer, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            tensors[f"low.{layer}"], tensors[f"high.{layer}"] = low.contiguous(), high.contiguous()
        metadata = {
            "format": FORMAT,
            "bits": str(self.bits),
            "fingerprint": self.fingerprint.model_dump_json(),
            "calibration": json.dumps(vars(self.calibration)),
            "formulas": json.dumps(current([_FORMULA])),
        }
        write_tensor_file(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read what `save` wrote. Raises ConfigError for a missing, damaged or foreign file."""
        if not path.is_file():
            raise ConfigError(f"kv_codebook={path}: no such file; intactkv kv-codebook writes it")
        try:
            metadata, tensors = read_tensor_file(path, floats=True)
        except CheckpointError as error:
            raise ConfigError(f"kv_codebook={path}: cannot be read ({error}); calibrate anew") from None
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise ConfigError(f"kv_codebook={path}: no file with a KV codebook (format {found!r}, expected {FORMAT!r})")
        try:
            layers = sum(key.startswith("low.") for key in tensors)
            done = parse_json(metadata["calibration"])
            old = stale(recorded([_FORMULA], parse_json(metadata.get("formulas", "{}"))))
            if old:
                raise ConfigError(f"kv_codebook={path}: made by the formula {old[0]}; calibrate anew")
            return cls(
                bits=int(metadata["bits"]),
                key_levels=tensors["key_levels"],
                value_levels=tensors["value_levels"],
                low=tuple(tensors[f"low.{layer}"] for layer in range(layers)),
                high=tuple(tensors[f"high.{layer}"] for layer in range(layers)),
                fingerprint=Fingerprint.model_validate_json(metadata["fingerprint"]),
                calibration=Calibration(**{**done, "front": tuple(done["front"])}),
            )
        except (KeyError, TypeError, ValueError, ValidationError) as error:
            raise ConfigError(f"kv_codebook={path}: damaged ({error}); calibrate anew") from None
