"""Whose KV a PivotKV is: the model that it was captured from, what it was trained for, and the chat head that it is.

Plain records, as they stand in the metadata of a file.
"""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, field_validator

_TINY = 2**-14  # below it fp16 has fewer digits


class Calibrated(BaseModel):
    """What a PivotKV was trained for, and how. It belongs to that quantized model alone.

    quantized: digest of all its packed weights. cell: how it is called. data: SHA-256 of the conversations.
    settings: of the training; held_out: its measures before and after; full_nll: one of them in full precision.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantized: str
    cell: str
    data: str
    settings: dict[str, str | int | float | bool]
    held_out: dict[str, tuple[float, float]]
    full_nll: float | None = None


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
