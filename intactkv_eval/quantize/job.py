"""What `intactkv quantize` is asked to do: method, its options, calibration; checked, and complete enough to repeat it.

A method is a frozen dataclass (method.Method): its fields beside bits, group_size and symmetric are its options, by
name, with its own defaults. Presets carry the settings of the published tables.
"""

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from intactkv_eval.cell.spec import ActivationSpec, PivotSpec, Spec, SymmetricFormula, formula_of
from intactkv_eval.errors import ConfigError, unknown_key
from intactkv_eval.quantize.awq import AWQ
from intactkv_eval.quantize.gptq import GPTQ
from intactkv_eval.quantize.method import Method
from intactkv_eval.quantize.omniquant import OmniQuant
from intactkv_eval.quantize.rtn import RTN

METHODS: dict[str, type[Any]] = {"rtn": RTN, "gptq": GPTQ, "awq": AWQ, "omniquant": OmniQuant}
DEFAULT_BITS = 4
_COMMON = ("bits", "group_size", "symmetric")


class CalibrationSpec(Spec):
    """Windows of `length` tokens of `data`, drawn by `seed`; behind a pivot's full-precision KV where one is named."""

    data: str
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = 0
    pivot: PivotSpec | None = None


class Job(Spec):
    """One quantized checkpoint. options: the method's own. rotate: the model is rotated first, as QuaRot does.

    symmetric_formula: whose formula symmetric weights follow, None for asymmetric ones; `job_from` chooses it.
    """

    method: str
    bits: int
    group_size: int = 128
    symmetric: bool = False
    symmetric_formula: SymmetricFormula | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSpec | None = None
    rotate: bool = False
    activations: ActivationSpec = ActivationSpec()

    @property
    def has_stages(self) -> bool:
        """Whether only our own format can say what the checkpoint is."""
        return self.rotate or self.activations.bits < 16

    def made(self) -> Method:
        """The method with its options."""
        method: Method = METHODS[self.method](self.bits, self.group_size, self.symmetric_formula, **self.options)
        return method


# What each method's authors calibrate on.
_DATA: dict[str, dict[str, Any]] = {
    "gptq": {"data": "c4"},
    "awq": {"data": "pile", "length": 512},
    "omniquant": {"data": "wikitext2"},
}
_FOLDING = {"awq", "omniquant"}  # methods that scale channels, V's among them
_PAPER = {"bits": 3, "group_size": 128}
_RELEASED = {"method": "gptq", "act_order": True, "static_groups": False, "damp": 0.01}  # as AutoGPTQ and QuaRot run it
PRESETS: dict[str, dict[str, Any]] = {
    "intactkv-rtn-w3g128": {"method": "rtn", **_PAPER},
    "intactkv-gptq-w3g128": {**_RELEASED, **_PAPER, "data": "c4"},
    "intactkv-awq-w3g128": {"method": "awq", **_PAPER, "data": "pile", "samples": 128, "length": 512},
    "omniquant-w3g128": {"method": "omniquant", **_PAPER, "let": False, "data": "wikitext2"},
    "quarot-w4a4": {
        **_RELEASED,
        "bits": 4,
        "group_size": -1,
        "symmetric": True,
        "shrink": True,
        "data": "wikitext2",
        "rotate": True,
        "act_bits": 4,
        "act_clip": 0.9,
    },
}
_STATIC_DATA = {"data": "pile", "length": 512}  # for static ranges of activations, as SmoothQuant's
_ACTIVATIONS = {"act_bits": "bits", "act_scheme": "scheme", "act_clip": "clip", "act_symmetric": "symmetric"}
_OF_CALIBRATION = ("data", "samples", "length", "seed", "pivot")


def job_from(given: Mapping[str, Any], options: list[str], preset: str | None = None) -> Job:
    """A job of flat values (None: not given) and `KEY=VALUE` options, laid over a preset's.

    Method `quarot` is the preset quarot-w4a4, or GPTQ on a rotated model with another one's settings.

    Raises ConfigError for an unknown name, a value out of range, or a value that would do nothing.
    """
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset {preset}: use one of {', '.join(PRESETS)}")
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("method") == "quarot":  # no rounding of its own: GPTQ on a rotated model
        preset, given = preset or "quarot-w4a4", {**given, "method": "gptq", "rotate": given.get("rotate", True)}
    flat = {**PRESETS.get(preset or "", {}), **given}
    method = flat.pop("method", "rtn")
    if method not in METHODS:
        raise ConfigError(f"--method {method}: use one of {', '.join(METHODS)}, quarot")
    common = {"bits": DEFAULT_BITS, **{key: flat.pop(key) for key in _COMMON if key in flat}}
    calibration = {key: flat.pop(key) for key in _OF_CALIBRATION if key in flat}
    activations = {field: flat.pop(key) for key, field in _ACTIVATIONS.items() if key in flat}
    common["rotate"] = bool(flat.pop("rotate", False))
    common["symmetric_formula"] = formula_of(method, common["rotate"]) if common.get("symmetric") else None
    _check_stages(method, common["rotate"], activations)
    own = _options(method, {**flat, **dict(_pair(text) for text in options)})
    try:
        static = activations.get("scheme") == "tensor"
        data = _DATA.get(method, _STATIC_DATA if static else None)
        made = {"calibration": _calibration(method, data, calibration), "activations": activations}
        job = Job.model_validate({"method": method, "options": own, **made, **common})
    except ValidationError as error:
        found = error.errors()[0]
        raise ConfigError(f"--{'.'.join(map(str, found['loc'])).replace('_', '-')}: {found['msg']}") from None
    job.made()
    return job


def layout_of(job: Job, asked: str | None) -> str:
    """The checkpoint format: what was asked, or one that holds the job. Raises ConfigError where that one cannot.

    What scales V is not written as gptq, where readers do not look for it.
    """
    own = "intactkv" if job.has_stages else None
    if own is None and job.method in _FOLDING:
        own = "awq" if job.method == "awq" and job.bits == 4 and not job.symmetric else "compressed-tensors"
        if asked == "gptq":
            raise ConfigError(f"--format gptq: {job.method} may scale V, which that format cannot say; use {own}")
    if job.has_stages and asked not in {None, own}:
        raise ConfigError(f"--format {asked}: cannot say that inputs are rotated or quantized; leave it out")
    return asked or own or "gptq"


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


def _check_stages(method: str, rotate: bool, activations: Mapping[str, Any]) -> None:
    if activations and activations.get("bits", 16) == 16:
        raise ConfigError("--act-scheme, --act-clip: do nothing without --act-bits 8, 6 or 4")
    if rotate and method in _FOLDING:
        raise ConfigError(f"--rotate: {method} scales channels, which a rotation mixes; use --method rtn or gptq")


def _calibration(method: str, data: Mapping[str, Any] | None, given: dict[str, Any]) -> dict[str, Any] | None:
    if data is None:
        if given:
            raise ConfigError(f"--{next(iter(given))}: does nothing with --method {method}, which is not calibrated")
        return None
    if given.get("pivot") is not None:
        pivot = str(given["pivot"])
        given["pivot"] = None if pivot == "none" else {"source": pivot}
    return {**data, **given}
