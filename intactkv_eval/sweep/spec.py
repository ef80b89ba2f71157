"""What a sweep's YAML may say, frozen and checked. A grid is the product of its lists; knows no models and no files.

    models x weights x activations x kv x pivots x tasks x seeds

An entry of the first five is a mapping of model arguments (README); a bare word is short for `pretrained` among models,
for `pivot` among pivots, for `task` among tasks. Besides, weights may be made (`quantize`), a codebook of `pre_rope`
calibrated (`codebook`) and a pivot trained (`calibrate`): each once, for all cells that need it. A table that is no
product is `grids`, a list of mappings: each a grid of its own, with the lists beside `grids` where it has none.
"""

from difflib import get_close_matches
from typing import Any

from pydantic import Field, ValidationError, model_validator

from intactkv_eval.cell.spec import Spec
from intactkv_eval.cell.trust import check_no_code
from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.documents import parse_yaml

Entry = dict[str, Any]


class CodebookSpec(Spec):
    """Calibration of kv_scheme=pre_rope: `samples` random pieces of `data`, of `length` tokens."""

    data: str
    samples: int = Field(default=16, ge=1)
    length: int = Field(default=512, ge=1)
    seed: int = 0


class QuantizeSpec(Spec):
    """A checkpoint, as `intactkv quantize` makes it: its options by name; options: the method's own."""

    method: str | None = None
    preset: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    data: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None
    pivot: str | None = None
    rotate: bool | None = None
    act_bits: int | None = None
    act_scheme: str | None = None
    act_clip: float | None = None
    act_symmetric: bool | None = None
    options: dict[str, str | int | float | bool] = Field(default_factory=dict)
    format: str | None = None
    dtype: str | None = None


class CalibrateSpec(Spec):
    """Training of the pivot's rows: options of `intactkv calibrate` by name; its own defaults hold where None."""

    data: str
    generate_answers: int | None = Field(default=None, ge=0)
    learning_rate: float | None = None
    batch_size: int | None = None
    epochs: int | None = None
    max_grad_norm: float | None = None
    held_out: float | None = None
    patience: int | None = None
    seed: int | None = None
    max_tokens: int | None = Field(default=None, ge=2)
    min_assistant_tokens: int | None = Field(default=None, ge=0)
    conversations: int | None = Field(default=None, ge=2)
    recompute: bool | None = None
    param_dtype: str | None = None


class TaskSpec(Spec):
    """A task and lm_eval's settings for it. seeds: instead of the sweep's."""

    task: str
    seeds: tuple[int, ...] | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    gen_kwargs: dict[str, Any] = Field(default_factory=dict)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None


class RunSpec(Spec):
    """How cells are run, none of which changes a figure.

    share: models stay loaded for the next cell. use_cache: lm_eval's response cache, so that a killed cell goes on
    inside. retries: of a cell whose process died. resources: of a cell, in Ray's words.
    """

    batch_size: int | str = 1
    max_batch_size: int | None = None
    share: bool = True
    use_cache: bool = False
    retries: int = Field(default=2, ge=0)
    resources: dict[str, float] = Field(default_factory=lambda: {"num_cpus": 1.0})


class GridSpec(Spec):
    """One product. exclude: cells that match every key of one of these (a list is any of its values)."""

    models: tuple[Entry, ...] = Field(min_length=1)
    weights: tuple[Entry, ...] = Field(default=({},), min_length=1)
    activations: tuple[Entry, ...] = Field(default=({},), min_length=1)
    kv: tuple[Entry, ...] = Field(default=({},), min_length=1)
    pivots: tuple[Entry, ...] = Field(default=({"pivot": "none"}, {"pivot": "bos"}), min_length=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = ()
    exclude: tuple[Entry, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        short = {"models": "pretrained", "pivots": "pivot", "tasks": "task"}
        full = dict(given)
        for name, key in short.items():
            if isinstance(full.get(name), list):
                full[name] = [{key: one} if isinstance(one, str) else one for one in full[name]]
        return full


class SweepSpec(Spec):
    """A whole sweep: the cells of its grids, each once."""

    grids: tuple[GridSpec, ...] = Field(min_length=1)
    run: RunSpec = RunSpec()

    @model_validator(mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        common = {key: value for key, value in given.items() if key not in {"grids", "run"}}
        grids = given.get("grids", [{}])
        if isinstance(grids, list):
            grids = [{**common, **one} if isinstance(one, dict) else one for one in grids]
        return {"grids": grids, **{key: given[key] for key in ("run",) if key in given}}


_UNKNOWN = "extra_forbidden"  # pydantic's type of error
_FIELDS = {
    "grids": [*GridSpec.model_fields, "grids", "run"],
    "tasks": list(TaskSpec.model_fields),
    "run": list(RunSpec.model_fields),
    **{spec.__name__: list(spec.model_fields) for spec in (CodebookSpec, QuantizeSpec, CalibrateSpec)},
}
"""The keys of a sweep's mappings: by the list or key that they stand in, or by the name of what is read alone."""


def read_sweep(text: str, name: str) -> SweepSpec:
    """The sweep of a YAML. Raises ConfigError that names the place and what was expected there.

    Whatever in it would run code is refused: it is taken from the command line alone.
    """
    given: Any = None
    try:
        given = parse_yaml(text)
        check_no_code(given, name, "intactkv sweep --model_args {key}={value}")
        return SweepSpec.model_validate(given)
    except ValidationError as error:
        several = isinstance(given, dict) and "grids" in given
        raise ConfigError(f"{name}: {readable(error, several)}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from None


def readable(error: ValidationError, several: bool = False) -> str:
    """Every place that is wrong, and what was expected there. several: the YAML itself speaks of `grids`.

    Where a key is unknown, nothing but that: what else is wrong may come from it.
    """
    wrong = error.errors()
    unknown = [one for one in wrong if one["type"] == _UNKNOWN]
    return "; ".join(
        f"{_place(one['loc'], several)}: {one['msg']}{_nearest(error.title, one['loc']) if unknown else ''}"
        for one in unknown or wrong
    )


def unknown_keys(given: Any, spec: type[Spec]) -> str | None:
    """What `readable` says of keys that `spec` does not know; None where it knows all."""
    try:
        spec.model_validate(given)
    except ValidationError as error:
        return readable(error) if any(one["type"] == _UNKNOWN for one in error.errors()) else None
    return None


def _nearest(root: str, found: tuple[int | str, ...]) -> str:
    parent = next((part for part in reversed(found[:-1]) if isinstance(part, str)), root)
    fields = _FIELDS.get(parent, [])
    near = get_close_matches(str(found[-1]), fields, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(fields)}" if fields else ""


def _place(found: tuple[int | str, ...], several: bool) -> str:
    inside = found if several or found[:1] != ("grids",) else found[2:]
    return ".".join(map(str, inside)) or "the whole"
