"""What `intactkv quantize` is asked to do: method, its options, calibration; checked, and complete enough to repeat it.

A method is a frozen dataclass (method.Method): its fields beside bits, group_size and symmetric are its options, by
name, with its own defaults. Presets carry the settings of the published tables.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from intactkv_eval.config import PivotSpec, Spec
from intactkv_eval.errors import ConfigError, unknown_key
from intactkv_eval.quantize.awq import AWQ
from intactkv_eval.quantize.gptq import GPTQ
from intactkv_eval.quantize.method import Method
from intactkv_eval.quantize.omniquant import OmniQuant
from intactkv_eval.quantize.rtn import RTN
from intactkv_eval.weights.quantized import check_bits

METHODS: dict[str, type[Any]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "omniquant": OmniQuant}
DEFAULT_BITS = 4
_COMMON = ("bits", "group_size", "symmetric")


class Calibration(Spec):
    """Windows of `length` tokens of `data`, drawn by `seed`; behind a pivot's full-precision KV where one is named."""

    data: str
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = 0
    pivot: PivotSpec | None = None


class Job(Spec):
    """One quantized checkpoint. options: the method's own."""

    method: str
    bits: int
    group_size: int = 128
    symmetric: bool = False
    options: dict[str, Any] = Field(default_factory=dict)
    calibration: Calibration | None = None

    def made(self) -> Method:
        """The method with its options."""
        method: Method = METHODS[self.method](self.bits, self.group_size, self.symmetric, **self.options)
        return method


# What each method's authors calibrate on.
_DATA: dict[str, dict[str, Any]] = {
    "gptq": {"data": "c4"},
    "awq": {"data": "pile", "length": 512},
    "omniquant": {"data": "wikitext2"},
}
_PAPER = {"bits": 3, "group_size": 128}
PRESETS: dict[str, dict[str, Any]] = {
    "intactkv-rtn-w3g128": {"method": "rtn", **_PAPER},
    "intactkv-gptq-w3g128": {"method": "gptq", **_PAPER, "act_order": True, "data": "c4"},
    "intactkv-awq-w3g128": {"method": "awq", **_PAPER, "data": "pile", "samples": 128, "length": 512},
    "omniquant-w3g128": {"method": "omniquant", **_PAPER, "let": False, "data": "wikitext2"},
}
_OF_CALIBRATION = ("data", "samples", "length", "seed", "pivot")


def job_from(given: Mapping[str, Any], options: list[str], preset: str | None = None) -> Job:
    """A job of flat values (None: not given) and `KEY=VALUE` options, laid over a preset's.

    Raises ConfigError for an unknown name, a value out of range, or a value that would do nothing.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    flat = {**PRESETS.get(preset or "", {}), **{key: value for key, value in given.items() if value is not None}}
    method = flat.pop("method", "rtn")
    if method not in METHODS:
        raise ConfigError(f"--method {method}: use one of {', '.join(METHODS)}")
    common = {"bits": DEFAULT_BITS, **{key: flat.pop(key) for key in _COMMON if key in flat}}
    check_bits(common["bits"])
    calibration = {key: flat.pop(key) for key in _OF_CALIBRATION if key in flat}
    own = _options(method, {**flat, **dict(_pair(text) for text in options)})
    try:
        job = Job.model_validate(
            {"method": method, "options": own, "calibration": _calibration(method, calibration), **common}
        )
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(f"--{'.'.join(map(str, found['loc'])).replace('_', '-')}: {found['msg']}") from None
    job.made()
    return job


def options_of(method: str) -> dict[str, Any]:
    """The method's own options and their defaults."""
    return {
        field.name: field.default
        for field in fields(METHODS[method])
        if field.name not in _COMMON and field.default is not MISSING
    }


def _options(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    known, types = options_of(method), get_type_hints(METHODS[method])
    found = {}
    for key, value in given.items():
        if key not in known:
            if not known:
                raise ConfigError(f"--option {key}: {method} has no options")
            raise unknown_key(key, list(known))
        try:
            found[key] = TypeAdapter(types[key]).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"--option {key}={value}: {error.errors()[0]['msg']}") from None
    return {**known, **found}


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign or not key or not value:
        raise ConfigError(f"--option {text}: write KEY=VALUE")
    return key, value


def _calibration(method: str, given: dict[str, Any]) -> dict[str, Any] | None:
    if method not in _DATA:
        if given:
            raise ConfigError(f"--{next(iter(given))}: does nothing with --method {method}, which is not calibrated")
        return None
    if given.get("pivot") is not None:
        pivot = str(given["pivot"])
        given["pivot"] = None if pivot == "none" else {"source": pivot}
    return {**_DATA[method], **given}
