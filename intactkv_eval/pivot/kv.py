"""PivotKV: the keys and values of the pivot tokens, as a value, with the identity of the model they came from.

A file is one safetensors: `keys.L`, `values.L` [H, P, D] for each layer L, `logits` [P, V], `weights.NAME` for each
tensor of the model that was sampled, and the fingerprint, token ids and head as JSON in its metadata. Knows no model
and no quantizer.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from intactkv_eval.documents import parse_json
from intactkv_eval.errors import CheckpointError, PivotError
from intactkv_eval.formulas import calibration_name, current, recorded, stale
from intactkv_eval.tensor_file import read_metadata, read_tensor_file, write_tensor_file

FORMAT = "intactkv-pivot-1"
ROUNDING = 2**-7  # rounded to fp16 by the one and to bf16 by the other
_TINY = 2**-14  # below it fp16 has fewer digits
_WEIGHTS = "weights."
_FIX = "it is damaged or another model's. Capture it anew: intactkv capture"


class Calibrated(BaseModel):
    """What a PivotKV was trained for, and how. It belongs to that quantized model alone.

    quantized: digest of all its packed weights. cell: how it is called. data: SHA-256 of the conversations.
    settings: of the training; held_out: its measures before and after; full_nats: one of them in full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantized: str
    cell: str
    data: str
    settings: dict[str, str | int | float | bool]
    held_out: dict[str, tuple[float, float]]
    full_nats: float | None = None


class ChatHead(BaseModel):
    """How the chat prompts were rendered whose head a PivotKV is.

    date: in ISO 8601, None where the head holds none. template: a hash of the chat template. arguments: what it was
    given besides the messages, each value as Python writes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    date: str | None = None
    template: str | None = None
    arguments: dict[str, str] = Field(default_factory=dict)

    @field_validator("date")
    @classmethod
    def _iso(cls, value: str | None) -> str | None:
        if value is not None:
            datetime.fromisoformat(value)
        return value


class Fingerprint(BaseModel):
    """Whose KV this is. Hashes are over a fixed sample of every tensor (see capture.weight_hash).

    embedding_sample: evenly spaced numbers of the embeddings, for models that hold the same in another precision.
    basis: `plain` is the model's own; a quantizer that rotates or rescales K or V names its own.
    calibrated: None for what the full-precision model computes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    revision: str
    weight_hash: str
    embedding_hash: str
    dtype: str
    basis: str = "plain"
    embedding_sample: tuple[float, ...] = ()
    calibrated: Calibrated | None = None

    def embeddings_differ(self, found_hash: str, found: tuple[float, ...], rows: tuple[float, ...] = ()) -> float:
        """How far other embeddings are from these, relative to each number or its row's size in `rows`."""
        own = self.embedding_sample
        if found_hash == self.embedding_hash:
            return 0.0
        pairs = list(zip(own, found, strict=False)) if len(own) == len(found) else []
        floors = [max(_TINY, 2 * size) for size in rows] or [_TINY] * len(pairs)
        sized = zip(pairs, floors, strict=True) if len(floors) == len(pairs) else ()
        return max((abs(one - other) / max(abs(one), floor) for (one, other), floor in sized), default=float("inf"))


@dataclass(frozen=True, eq=False)
class PivotKV:
    """Full-precision KV of P pivot tokens.

    keys, values: one [H, P, D] a layer, keys after RoPE. logits: [P, V], the full-precision model's own. weights: a
    sample of that model's tensors by name (weight_sample.py), by which its quantized copies are known. head: how the
    chat prompts were rendered whose head the tokens are, None where they were chosen otherwise.
    """

    token_ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor
    fingerprint: Fingerprint
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    head: ChatHead | None = None

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        if not length:
            raise PivotError("a PivotKV needs at least one token")
        if len(self.keys) != len(self.values) or not self.keys:
            raise PivotError(f"a PivotKV needs as many keys as values: {len(self.keys)} and {len(self.values)} layers")
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            if any(rows.ndim != 3 or rows.shape[1] != length or not rows.numel() for rows in (key, value)):
                raise PivotError(
                    f"layer {layer}: keys {tuple(key.shape)} and values {tuple(value.shape)} should be [H, {length}, D]"
                )
        if self.logits.ndim != 2 or self.logits.shape[0] != length or not self.logits.numel():
            raise PivotError(f"logits {tuple(self.logits.shape)} should be [{length}, V]")
        for name, sample in self.weights.items():
            if sample.ndim not in (1, 2) or not sample.numel():
                raise PivotError(f"{_WEIGHTS}{name} {tuple(sample.shape)} should be a sample [N] or [R, C]: {_FIX}")
        for tensor in (*self.keys, *self.values, self.logits):
            if not torch.isfinite(tensor).all():
                raise PivotError(
                    "the pivot's KV or logits hold NaN or infinite values: in fp16 massive activations overflow; "
                    "load the full-precision model with dtype=bfloat16 or float32"
                )

    def __len__(self) -> int:
        return len(self.token_ids)

    def check_matches(self, *, token_ids: tuple[int, ...] | None = None, **expected: str | None) -> None:
        """Raise PivotError unless the token ids and each given field of the fingerprint are equal to this PivotKV's."""
        if token_ids is not None and token_ids != self.token_ids:
            raise PivotError(f"this PivotKV holds tokens {list(self.token_ids)}, not the expected {list(token_ids)}")
        for name, value in expected.items():
            found = getattr(self.fingerprint, name)
            if value is not None and value != found:
                raise PivotError(
                    f"this PivotKV was captured from {self.fingerprint.model} ({self.fingerprint.dtype}) and does not "
                    f"belong to this model: its {name} is {found}, expected {value}. Capture it anew from the "
                    "full-precision model that was quantized, in the dtype of the evaluation: intactkv capture"
                )

    def check_embeddings(self, found_hash: str, found: tuple[float, ...], rows: tuple[float, ...] = ()) -> None:
        """Raise PivotError unless the embeddings are this PivotKV's, be it rounded once more to 16 bits.

        Packed checkpoints store in 16 bits what the full-precision model may hold in 32. `rows`: the size of each
        number's row, where they were rotated when they were rounded, which spreads a row's rounding over it.
        """
        worst = self.fingerprint.embeddings_differ(found_hash, found, rows)
        if worst > ROUNDING:
            raise PivotError(
                f"this PivotKV was captured from {self.fingerprint.model} and does not belong to this model: their "
                f"embeddings differ by {worst:.2g} of their size (rounding to 16 bits: at most {ROUNDING:.2g}). "
                "Capture it from the full-precision model that was quantized: reference=..., or intactkv capture"
            )

    def with_logits_of(self, own: Tensor) -> "PivotKV":
        """For a model whose vocabulary was padded or cut since: what it alone has words for is as it computes it."""
        if len(own) != len(self.logits) or own.shape == self.logits.shape:
            return self
        words = min(own.shape[1], self.logits.shape[1])
        logits = torch.cat([self.logits[:, :words], own[:, words:].to(self.logits)], dim=1)
        return replace(self, logits=logits)

    def check_fits(self, keys: Sequence[Tensor], values: Sequence[Tensor], logits: Tensor) -> None:
        """Raise PivotError unless the model computes tensors like these: of as many layers, each shape, each dtype.

        keys, values, logits: what the model itself computes for this PivotKV's tokens. Heads and widths are not read
        from its config: they may differ from layer to layer, and between keys and values.
        """
        if len(keys) != len(self.keys):
            raise PivotError(f"this PivotKV has {len(self.keys)} layers, this model caches KV in {len(keys)}: {_FIX}")
        names = [f"{kind} of layer {layer}" for kind in ("keys", "values") for layer in range(len(keys))]
        pairs = zip((*self.keys, *self.values, self.logits), (*keys, *values, logits), strict=True)
        for name, (own, other) in zip([*names, "logits"], pairs, strict=True):
            if own.shape != other.shape or own.dtype != other.dtype:
                raise PivotError(
                    f"this PivotKV's {name} are {_form(own)}, and this model computes {_form(other)}: {_FIX}"
                )

    @property
    def formula(self) -> str:
        """The name of the formula that made these rows: the model's own forward, or a training."""
        calibrated = self.fingerprint.calibrated
        return "pivot" if calibrated is None else calibration_name("targets" in calibrated.settings)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically. Raises OSError as the file system does."""
        tensors = {"logits": self.logits.contiguous()}
        tensors |= {f"{_WEIGHTS}{name}": sample for name, sample in self.weights.items()}
        for layer, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            tensors[f"keys.{layer}"], tensors[f"values.{layer}"] = key.contiguous(), value.contiguous()
        metadata = {
            "format": FORMAT,
            "token_ids": json.dumps(list(self.token_ids)),
            "fingerprint": self.fingerprint.model_dump_json(),
            "formulas": json.dumps(current([self.formula])),
        }
        if self.head is not None:
            metadata["chat_head"] = self.head.model_dump_json()
        write_tensor_file(path, tensors, metadata)

    @classmethod
    def load(cls, path: Path) -> "PivotKV":
        """Read what `save` wrote. Raises PivotError for a missing, damaged or foreign file."""
        if not path.is_file():
            raise PivotError(f"pivot file {path} does not exist")
        try:
            metadata, tensors = read_tensor_file(path, floats=True)
        except CheckpointError as error:
            raise PivotError(f"pivot file {path} cannot be read ({error}): capture it anew") from None
        if metadata.get("format") != FORMAT:
            raise PivotError(f"{path} is no PivotKV file (format {metadata.get('format')!r}, expected {FORMAT!r})")
        try:
            layers = sum(key.startswith("keys.") for key in tensors)
            found = cls(
                token_ids=_token_ids(metadata["token_ids"]),
                keys=tuple(tensors[f"keys.{layer}"] for layer in range(layers)),
                values=tuple(tensors[f"values.{layer}"] for layer in range(layers)),
                logits=tensors["logits"],
                fingerprint=Fingerprint.model_validate_json(metadata["fingerprint"]),
                weights={
                    name.removeprefix(_WEIGHTS): held for name, held in tensors.items() if name.startswith(_WEIGHTS)
                },
                head=_head(metadata),
            )
            old = stale(recorded([found.formula], parse_json(metadata.get("formulas", "{}"))))
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # pydantic's is a ValueError
            raise PivotError(f"pivot file {path} is damaged ({error}): capture it anew") from None
        if old:
            again = "capture it" if found.formula == "pivot" else "train it"
            raise PivotError(f"pivot file {path} was made by the formula {old[0]}: {again} anew")
        return found


def head_of_file(path: Path) -> ChatHead | None:
    """The `head` of a PivotKV file, read without its tensors. Raises PivotError for a missing or damaged file."""
    if not path.is_file():
        raise PivotError(f"pivot file {path} does not exist")
    try:
        return _head(read_metadata(path))
    except (CheckpointError, ValueError) as error:
        raise PivotError(f"pivot file {path} cannot be read ({error}): capture it anew") from None


def _head(metadata: Mapping[str, str]) -> ChatHead | None:
    """Raises ValueError, as pydantic does, where it is damaged."""
    return ChatHead.model_validate_json(metadata["chat_head"]) if "chat_head" in metadata else None


def _token_ids(text: str) -> tuple[int, ...]:
    """Of a file's metadata. Raises ValueError for what is no list of token ids: 256.9 or "256" is none."""
    found = parse_json(text)
    if not isinstance(found, list) or any(type(token) is not int or token < 0 for token in found):
        raise ValueError(f"token_ids {text[:80]}: expected a list of whole numbers from 0")
    return tuple(found)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"
