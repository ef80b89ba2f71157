"""A cell: model x weights x activations x KV cache x pivot, frozen and checked; and how flat arguments become one.

The flat keys are those of lm_eval's --model_args, and a YAML of model_configs/ holds the same keys. Every key either
acts or is an error: unknown keys, keys that do nothing in this cell, and values out of range are refused with the
nearest right name. Knows no torch.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from intactkv_eval.config_files import load_config
from intactkv_eval.errors import ConfigError, unknown_key


class Spec(BaseModel):
    """Base of all specs: frozen, and no field that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Spec):
    """Which weights: `pretrained` is evaluated; the pivot is captured from `reference` where that is another model."""

    pretrained: str
    revision: str = "main"
    dtype: str = "auto"
    reference: str | None = None


class WeightSpec(Spec):
    """How the linear layers of the decoder are quantized. group_size -1 is one scale per output channel.

    search: llm-awq's search result, whose scales and clips are applied before rounding (method `awq`).
    rotate: the model is rotated first, as QuaRot does, also where the weights then stay in full precision.
    """

    method: Literal["none", "rtn", "awq"] = "none"
    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    symmetric: bool = False
    search: str | None = None
    rotate: bool = False

    @field_validator("group_size")
    @classmethod
    def _positive(cls, value: int | None) -> int | None:
        if value is not None and value != -1 and value < 1:
            raise ValueError("use a positive size, or -1 for one scale per output channel")
        return value


class ActivationSpec(Spec):
    """How the inputs of the decoder's linear layers are quantized, simulated; bits 16 is off.

    Scheme `token`: dynamic, each token's own range. `tensor`: static, a calibrated range a layer. clip: the share kept.
    """

    bits: Literal[4, 6, 8, 16] = 16
    scheme: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    clip: float = Field(default=1.0, gt=0, le=1)


class KVSpec(Spec):
    """How the KV cache is quantized at the moment of writing; bits 16 is off.

    token_head: asymmetric min/max over each token's head_dim, keys after RoPE (the IntactKV paper's).
    channel_key: keys by channel over `group` tokens, values by token, the newest `recent` tokens in full (KIVI's).
    pre_rope: keys before RoPE, at the uneven `levels` of a calibration file (KVQuant's).
    `keep` first tokens are left alone although the evaluated model computed them; `exempt`: intact pivot rows are.
    rotate: keys are quantized behind a Hadamard transform of head_dim, as QuaRot does; clip: the share of each row's
    range, zero among it, that is kept (both of token_head).
    """

    bits: Literal[2, 3, 4, 5, 6, 7, 8, 16] = 16
    scheme: Literal["token_head", "channel_key", "pre_rope"] = "token_head"
    keep: int = Field(default=0, ge=0)
    group: int | None = Field(default=None, ge=2)
    recent: int | None = Field(default=None, ge=0)
    levels: str | None = None
    exempt: bool = True
    rotate: bool = False
    clip: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> "KVSpec":
        if any((self.scheme == "channel_key") != (value is not None) for value in (self.group, self.recent)):
            raise ValueError("kv_group and kv_recent: do nothing without kv_scheme=channel_key, which needs both")
        if self.group and self.recent and self.recent % self.group:
            raise ValueError(f"kv_recent={self.recent} is no multiple of kv_group={self.group}: choose one that is")
        if (self.scheme == "pre_rope") != (self.levels is not None):
            raise ValueError("kv_scheme=pre_rope needs kv_levels=FILE (intactkv kv-levels makes it); no other takes it")
        if self.scheme != "token_head" and (self.rotate or self.clip < 1):
            raise ValueError(f"kv_rotate and kv_clip: do nothing with kv_scheme={self.scheme}, only with token_head")
        return self


class PivotSpec(Spec):
    """Which tokens stand in front of every request, and whether their KV is the full-precision model's (`intact`).

    source: bos, prompt, tokens:ID+ID+... or a PivotKV .safetensors file. (lm_eval splits arguments at commas.)
    """

    source: str = "bos"
    intact: bool = True
    chat_template: str | None = None

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if value in {"bos", "prompt"} or value.startswith("tokens:") or value.endswith(".safetensors"):
            return value
        near = get_close_matches(value, ["none", "bos", "prompt"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"use none, bos, prompt, tokens:ID+ID+... or a PivotKV file ending in .safetensors{hint}")

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        """The ids of a `tokens:` source, else None. Raises ConfigError where they are no numbers."""
        if not self.source.startswith("tokens:"):
            return None
        listed = re.split("[+,; ]+", self.source.removeprefix("tokens:").strip())
        if not all(part.isdigit() for part in listed):
            raise ConfigError(f"pivot={self.source!r}: write token ids as numbers, for instance tokens:1+319+13563")
        return tuple(int(part) for part in listed)


class CellSpec(Spec):
    """One cell of the product's table."""

    model: ModelSpec
    weights: WeightSpec = WeightSpec()
    activations: ActivationSpec = ActivationSpec()
    kv: KVSpec = KVSpec()
    pivot: PivotSpec = PivotSpec()
    backend: Literal["auto", "dense", "cpu", "triton", "gptqmodel"] = "auto"
    share_prefix: bool = True

    @model_validator(mode="after")
    def _quantized_whole(self) -> "CellSpec":
        if self.weights.method != "none" and self.weights.bits is None:
            raise ValueError(f"weights={self.weights.method} needs bits=2, 3, 4 or 8")
        if (self.weights.method == "awq") != (self.weights.search is not None):
            raise ValueError("weights=awq needs awq_search=FILE.pt (llm-awq's search result); nothing else takes it")
        if self.weights.rotate and self.weights.search is not None:
            raise ValueError("weights=awq with rotate=true: the scales were searched for the unrotated model")
        if self.activations.scheme == "tensor":
            raise ValueError(
                "act_scheme=tensor needs calibrated ranges, which only a checkpoint carries: make one with "
                "`intactkv quantize` and name it with pretrained=..., or use act_scheme=token"
            )
        return self


# flat key -> (part of the cell, field); what is not here is the cell's own
_PLACES: dict[str, tuple[str, str]] = {
    "pretrained": ("model", "pretrained"),
    "revision": ("model", "revision"),
    "dtype": ("model", "dtype"),
    "reference": ("model", "reference"),
    "weights": ("weights", "method"),
    "bits": ("weights", "bits"),
    "group_size": ("weights", "group_size"),
    "symmetric": ("weights", "symmetric"),
    "awq_search": ("weights", "search"),
    "rotate": ("weights", "rotate"),
    "act_bits": ("activations", "bits"),
    "act_scheme": ("activations", "scheme"),
    "act_symmetric": ("activations", "symmetric"),
    "act_clip": ("activations", "clip"),
    "kv_bits": ("kv", "bits"),
    "kv_scheme": ("kv", "scheme"),
    "kv_keep": ("kv", "keep"),
    "kv_group": ("kv", "group"),
    "kv_recent": ("kv", "recent"),
    "kv_levels": ("kv", "levels"),
    "kv_exempt": ("kv", "exempt"),
    "kv_rotate": ("kv", "rotate"),
    "kv_clip": ("kv", "clip"),
    "pivot": ("pivot", "source"),
    "intact": ("pivot", "intact"),
    "chat_template": ("pivot", "chat_template"),
    "backend": ("", "backend"),
    "share_prefix": ("", "share_prefix"),
}
CELL_KEYS = (*_PLACES, "config")
# lm_eval reads the word none as Python's None; for these two keys it is a choice, not an absence.
_NONE_IS_A_VALUE = {"pivot", "weights"}
DEFAULT_GROUP_SIZE = 128
KV_GROUP, KV_RECENT = 32, 128


def cell_from_args(args: Mapping[str, Any]) -> CellSpec:
    """The cell of flat arguments; `config` names a YAML that they are laid over.

    Raises ConfigError for an unknown key, a key that does nothing, a missing key or a value out of range.
    """
    given = {key: value for key, value in args.items() if _means_something(key, value)}
    flat = _laid_over(load_config(str(given.pop("config"))), given) if "config" in given else given
    for key in flat:
        if key.isdigit():
            raise ConfigError(f"argument {key!r}: lm_eval splits arguments at commas; write pivot=tokens:1+319+13563")
        if key not in _PLACES:
            raise unknown_key(key, CELL_KEYS)
    if "pretrained" not in flat:
        raise ConfigError("no model given: set pretrained=<folder or hub id>, or config=<name> with one in it")
    flat = _expand(flat)
    _refuse_idle_keys(flat)
    nested: dict[str, Any] = {"model": {}, "weights": {}, "activations": {}, "kv": {}, "pivot": {}}
    for key, value in flat.items():
        part, field = _PLACES[key]
        (nested[part] if part else nested)[field] = value
    try:
        return CellSpec.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None


def _expand(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out shorthands: pivot=none, and the default group size."""
    full = {key: value for key, value in flat.items() if _means_something(key, value)}
    for key in _NONE_IS_A_VALUE & full.keys():
        full[key] = "none" if str(full[key]).lower() == "none" else full[key]
    if isinstance(full.get("pivot"), int):
        raise ConfigError(f"pivot={full['pivot']!r}: write pivot=tokens:{full['pivot']} for a token id")
    if full.get("pivot") == "none":
        if full.get("intact"):
            raise ConfigError("pivot=none,intact=true contradict each other: none means bos with intact=false")
        full["pivot"], full["intact"] = "bos", False
    if full.get("weights", "none") != "none":
        full.setdefault("group_size", DEFAULT_GROUP_SIZE)
    if full.get("kv_scheme") == "channel_key":
        full = {"kv_group": KV_GROUP, "kv_recent": KV_RECENT, **full}
    for key in ("pretrained", "revision", "dtype", "reference", "kv_levels"):
        if key in full:
            full[key] = str(full[key]).removeprefix("torch.")
    return full


# A key that is given explicitly takes with it what the file said about the choice it replaces.
_REPLACES = {
    "weights": ("bits", "group_size", "symmetric", "awq_search", "backend", "rotate"),
    "act_bits": ("act_scheme", "act_symmetric", "act_clip"),
    "kv_bits": ("kv_scheme", "kv_keep", "kv_group", "kv_recent", "kv_levels", "kv_exempt", "kv_rotate", "kv_clip"),
    "kv_scheme": ("kv_group", "kv_recent", "kv_levels"),
    "pivot": ("intact", "reference"),
}


def _laid_over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Explicit arguments over a config file's."""
    changed = [key for key in _REPLACES if key in given and given[key] != file.get(key)]
    gone = {part for key in changed for part in _REPLACES[key]}
    if given.get("intact") is False or str(given.get("pivot", "")).lower() == "none":
        gone |= {"reference", "kv_exempt"}
    return {**{key: value for key, value in file.items() if key not in gone}, **given}


def _means_something(key: str, value: Any) -> bool:
    return value is not None or key in _NONE_IS_A_VALUE


_QUANTIZED = {
    "weights": "quantized weights; add weights=rtn",
    "act_bits": "quantized activations; add act_bits=8",
    "kv_bits": "a quantized KV cache; add kv_bits=4",
}


def _refuse_idle_keys(flat: Mapping[str, Any]) -> None:
    off = {key for key in _QUANTIZED if str(flat.get(key, "none")) in {"none", "16"}}
    for key in sorted(off):
        idle = [part for part in _REPLACES[key] if part in flat and part not in {"backend", "rotate"}]
        if idle:
            raise ConfigError(f"{', '.join(idle)}: does nothing without {_QUANTIZED[key]} or drop it")
    if flat.get("rotate") and off == set(_QUANTIZED):
        raise ConfigError("rotate: does nothing where nothing is quantized; add weights=rtn or drop it")
    if "kv_exempt" in flat and not flat.get("intact", True):
        raise ConfigError("kv_exempt: does nothing without intact pivot rows; kv_keep leaves first tokens alone")
    if "reference" in flat and str(flat.get("pivot")).endswith(".safetensors"):
        raise ConfigError("reference: does nothing where the pivot's KV comes from a file; drop one of the two")
    if not flat.get("intact", True) and "reference" in flat:
        raise ConfigError("reference: does nothing with intact=false (or pivot=none), where no pivot KV is captured")


def _readable(error: ValidationError) -> str:
    """Pydantic's finding in the user's keys."""
    names = {place: key for key, place in _PLACES.items()}
    found = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        key = names.get((path[0], path[1])) if len(path) > 1 else (path[0] if path else "cell")
        shown = f"={item['input']!r}" if len(path) > 0 and not isinstance(item["input"], dict) else ""
        found.append(f"{key or '.'.join(path)}{shown}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)
