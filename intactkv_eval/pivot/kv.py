"""PivotKV: the keys and values of the pivot tokens, as a value, with the identity of the model they came from.

A file is one safetensors: `keys.L`, `values.L` [H, P, D] for each layer L, `logits` [P, V], the same three behind
`long.` where they depend on the length of the text, `weights.NAME` for each tensor of the model that was sampled, and
the fingerprint, token ids and head as JSON in its metadata. Knows no model and no quantizer.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from intactkv_eval.cell.formulas import calibration_name, current, recorded, stale
from intactkv_eval.errors import CheckpointError, PivotError
from intactkv_eval.pivot.identity import ChatHead, Fingerprint
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.tensor_file import read_metadata, read_tensor_file, write_tensor_file

FORMAT = "intactkv-pivot-2"
ROUNDING = 2**-7  # rounded to fp16 by the one and to bf16 by the other

_WEIGHTS, _LONG = "weights.", "long."
_FIX = "it is damaged or another model's. Capture it anew: intactkv capture"


class Computed(NamedTuple):
    """Of P tokens at positions 0..P-1: keys and values [H, P, D] of each layer, logits [P, V]."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor


@dataclass(frozen=True, eq=False)
class PivotKV:
    """Full-precision KV of P pivot tokens.

    keys, values: one [H, P, D] a layer, keys after RoPE. logits: [P, V], the full-precision model's own. weights: a
    sample of that model's tensors by name (weight_sample.py), by which its quantized copies are known. long: the same
    tokens with the RoPE frequencies of long texts, for models whose frequencies have two sets (longrope). head: how the
    chat prompts were rendered whose head the tokens are, None where they were chosen otherwise.
    """

    token_ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    logits: Tensor
    fingerprint: Fingerprint
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    long: Computed | None = None
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
        for tensor in (*self.keys, *self.values, self.logits, *self._long_tensors()):
            if not torch.isfinite(tensor).all():
                raise PivotError(
                    "the pivot's KV or logits hold NaN or infinite values: in fp16 massive activations overflow; "
                    "load the full-precision model with dtype=bfloat16 or float32"
                )

    def __len__(self) -> int:
        return len(self.token_ids)

    def _long_tensors(self) -> list[Tensor]:
        """The tensors of `long`. Raises PivotError where they are not shaped as those of short texts."""
        if self.long is None:
            return []
        own, other = ([*one.keys, *one.values, one.logits] for one in (self, self.long))
        if [_form(tensor) for tensor in own] != [_form(tensor) for tensor in other]:
            raise PivotError(f"the pivot's rows for long texts are not shaped as those for short ones: {_FIX}")
        return other

    def in_long_texts(self) -> "PivotKV | None":
        """What stands in front of texts that are so long that the RoPE frequencies are others; None: not captured."""
        return None if self.long is None else replace(self, **self.long._asdict(), long=None)

    def with_values(self, change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], basis: str) -> "PivotKV":
        """Its values of all layers, also those for long texts, as `change` gives them; `basis` names what they are in.

        Keys and logits are those of the model in any basis.
        """
        long = self.long and self.long._replace(values=change(self.long.values))
        fingerprint = self.fingerprint.model_copy(update={"basis": basis})
        return replace(self, values=change(self.values), long=long, fingerprint=fingerprint)

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

        def widened(logits: Tensor) -> Tensor:
            return torch.cat([logits[:, :words], own[:, words:].to(logits)], dim=1)

        long = self.long and self.long._replace(logits=widened(self.long.logits))
        return replace(self, logits=widened(self.logits), long=long)

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
        tensors = _to_file(Computed(self.keys, self.values, self.logits))
        tensors |= {f"{_LONG}{name}": rows for name, rows in (_to_file(self.long) if self.long else {}).items()}
        tensors |= {f"{_WEIGHTS}{name}": sample for name, sample in self.weights.items()}
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
            long = _behind(_LONG, tensors)
            found = cls(
                _token_ids(metadata["token_ids"]),
                *_of_file(tensors),
                fingerprint=Fingerprint.model_validate_json(metadata["fingerprint"]),
                weights=_behind(_WEIGHTS, tensors),
                long=_of_file(long) if long else None,
                head=_head(metadata),
            )
            old = stale(recorded([found.formula], parse_json(metadata.get("formulas", "{}"))))
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # pydantic's is a ValueError
            raise PivotError(f"pivot file {path} is damaged ({error}): capture it anew") from None
        if old:
            again = "capture it" if found.formula == "pivot" else "train it"
            raise PivotError(f"pivot file {path} was made by the formula {old[0]}: {again} anew")
        return found


def _to_file(rows: Computed) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    kinds = {"keys": rows.keys, "values": rows.values}
    named = {f"{kind}.{layer}": part for kind, parts in kinds.items() for layer, part in enumerate(parts)}
    return {name: part.contiguous() for name, part in {"logits": rows.logits, **named}.items()}


def _of_file(tensors: Mapping[str, Tensor]) -> Computed:
    """What `_to_file` named. Raises KeyError where a tensor is missing."""
    layers = range(sum(name.startswith("keys.") for name in tensors))
    keys, values = (tuple(tensors[f"{kind}.{layer}"] for layer in layers) for kind in ("keys", "values"))
    return Computed(keys, values, tensors["logits"])


def _behind(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): held for name, held in tensors.items() if name.startswith(prefix)}


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
