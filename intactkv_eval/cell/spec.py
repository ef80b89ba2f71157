"""A cell: model x weights x activations x KV cache x pivot, frozen and checked. How flat arguments become one is in
cell/arguments.py. Knows no torch.
"""

import re
from datetime import datetime
from difflib import get_close_matches
from pathlib import PurePath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from intactkv_eval.errors import ConfigError

SymmetricFormula = Literal["gptq", "quarot", "omniquant", "awq"]
"""Whose released formula gives symmetric weights their scale; quantize/rtn.py writes the formulas out."""


def formula_of(method: str, rotate: bool) -> SymmetricFormula:
    """The formula of symmetric weights that `method` makes: that of its own released code, QuaRot's if rotated."""
    own: dict[str, SymmetricFormula] = {"omniquant": "omniquant", "awq": "awq"}
    return "quarot" if rotate else own.get(method, "gptq")


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

    @property
    def symmetric_formula(self) -> SymmetricFormula | None:
        """Whose formula the symmetric weights follow; None where they are asymmetric."""
        return formula_of(self.method, self.rotate) if self.symmetric else None

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

    token_head: asymmetric, an integer zero point for each token's head_dim, keys after RoPE (the IntactKV paper's).
    channel_key: keys by channel over `group_size` tokens, values by token (KIVI's). Of T tokens in front of a query the
    newest T mod `residual_length` keys and the newest `residual_length` values are in full.
    pre_rope: keys before RoPE, at the uneven levels of a calibrated `codebook` (KVQuant's).
    sink_tokens: the number of leading tokens that are never quantized. quantize_pivot: intact pivot rows are, too.
    rotate: keys are quantized behind a Hadamard transform of head_dim, as QuaRot does; clip: the share of each row's
    range that is kept. Both are of token_head, and either of them makes its range QuaRot's.
    """

    bits: Literal[2, 3, 4, 5, 6, 7, 8, 16] = 16
    scheme: Literal["token_head", "channel_key", "pre_rope"] = "token_head"
    sink_tokens: int = Field(default=0, ge=0)
    group_size: int | None = Field(default=None, ge=2)
    residual_length: int | None = Field(default=None, ge=1)
    codebook: str | None = None
    quantize_pivot: bool = False
    rotate: bool = False
    clip: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _whole(self) -> "KVSpec":
        if any(
            (self.scheme == "channel_key") != (value is not None) for value in (self.group_size, self.residual_length)
        ):
            raise ValueError(
                "kv_group_size and kv_residual_length: do nothing without kv_scheme=channel_key, which needs both"
            )
        if self.group_size and self.residual_length and self.residual_length % self.group_size:
            raise ValueError(
                f"kv_residual_length={self.residual_length} is no multiple of kv_group_size={self.group_size}: "
                "choose one that is"
            )
        if (self.scheme == "pre_rope") != (self.codebook is not None):
            raise ValueError(
                "kv_scheme=pre_rope needs kv_codebook=FILE (intactkv kv-codebook makes it); no other takes it"
            )
        if self.scheme != "token_head" and (self.rotate or self.clip < 1):
            raise ValueError(f"kv_rotate and kv_clip: do nothing with kv_scheme={self.scheme}, only with token_head")
        return self


PivotKind = Literal["bos", "prompt", "auto", "tokens", "prefix_file", "kv_file"]
"""What a pivot's source is: BOS, the head of chat prompts, a search, ids, a prefix file, a PivotKV file."""
_KINDS: dict[str, PivotKind] = {"bos": "bos", "prompt": "prompt", "auto": "auto"}
_KINDS_OF_FILES: dict[str, PivotKind] = {".safetensors": "kv_file", ".json": "prefix_file"}


def pivot_kind(source: object) -> PivotKind | None:
    """The kind of a pivot's source, None where it is none. The one place where a file's name tells its kind."""
    text = str(source)
    if text.startswith("tokens:"):
        return "tokens"
    return _KINDS.get(text) or _KINDS_OF_FILES.get(PurePath(text).suffix)


class PivotSpec(Spec):
    """Which tokens stand in front of every request, and whether their KV is the full-precision model's (`intact`).

    source: bos, prompt, tokens:ID+ID+..., or a PivotKV .safetensors file. (lm_eval splits arguments at commas.)
    auto: BOS and the tokens that keep others from becoming pivots, searched; or the .json of `intactkv pivots --out`.
    transfer: a calibrated PivotKV may be one that was trained for another quantized model.
    chat_date: the date, or date and time, that chat templates read instead of the clock, in ISO 8601.
    """

    source: str = "bos"
    intact: bool = True
    transfer: bool = False
    chat_template: str | None = None
    chat_date: str | None = None

    @field_validator("chat_date", mode="before")
    @classmethod
    def _in_iso(cls, value: object) -> str | None:
        if value is None:
            return None
        try:
            if not re.match(r"\d{4}-\d{2}-\d{2}(T|$)", str(value)):
                raise ValueError(value)
            moment = datetime.fromisoformat(str(value))
        except ValueError:
            raise ValueError("write a date as 2026-11-28, or with a time as 2026-11-28T09:30") from None
        if moment.tzinfo is not None:
            raise ValueError("chat templates read local time: leave out the time zone")
        at_midnight = moment.time() == datetime.min.time()
        return moment.date().isoformat() if at_midnight else moment.replace(microsecond=0).isoformat()

    @field_validator("source")
    @classmethod
    def _known_source(cls, value: str) -> str:
        if pivot_kind(value) is not None:
            return value
        near = get_close_matches(value, ["none", "bos", "prompt", "auto"], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            "use none, bos, prompt, auto, tokens:ID+ID+..., a PivotKV file ending in .safetensors, or a prefix that "
            f"`intactkv pivots` wrote, ending in .json{hint}"
        )

    @property
    def kind(self) -> PivotKind:
        """What `source` is."""
        kind = pivot_kind(self.source)
        assert kind is not None  # the validator refuses others
        return kind

    @property
    def token_ids(self) -> tuple[int, ...] | None:
        """The ids of a `tokens:` source, else None. Raises ConfigError where they are no numbers."""
        if self.kind != "tokens":
            return None
        listed = re.split("[+,; ]+", self.source.removeprefix("tokens:").strip())
        if not all(re.fullmatch(r"[0-9]{1,18}", part) for part in listed):
            raise ConfigError(
                f"pivot={self.source[:80]!r}: write token ids as numbers, for instance tokens:1+319+13563"
            )
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
