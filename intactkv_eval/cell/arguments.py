"""How flat arguments become a cell (cell/spec.py).

The flat keys are those of lm_eval's --model_args, and a YAML of model_configs/ holds the same keys. Every key either
acts or is an error: unknown keys, keys that do nothing in this cell, and values out of range are refused with the
nearest right name. Knows no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from intactkv_eval.cell.config_files import load_config
from intactkv_eval.cell.spec import CellSpec, pivot_kind
from intactkv_eval.errors import ConfigError, unknown_key


class Key(NamedTuple):
    """Where a flat key lies in a cell (no part: the cell's own field), and what it says, for help and docs."""

    part: str
    field: str
    help: str


KEYS: dict[str, Key] = {
    "pretrained": Key(
        "model",
        "pretrained",
        "The model to evaluate: a folder or a hub id, in full precision or a quantized checkpoint.",
    ),
    "revision": Key("model", "revision", "The branch, tag or commit on the hub (main)."),
    "dtype": Key("model", "dtype", "The dtype of what stays in full precision: auto, float32, bfloat16 or float16."),
    "reference": Key(
        "model",
        "reference",
        "The full-precision model that the pivot is captured from, where pretrained is a quantized one.",
    ),
    "weights": Key("weights", "method", "Quantize the weights on loading: none, rtn, or awq with awq_search."),
    "bits": Key("weights", "bits", "The bits of a weight: 2, 3, 4 or 8."),
    "group_size": Key(
        "weights", "group_size", "The number of inputs that share a scale (128); -1 for one scale per channel."
    ),
    "symmetric": Key("weights", "symmetric", "true: symmetric scales, by the released formula of the method."),
    "awq_search": Key("weights", "search", "A search result of llm-awq (.pt), for weights=awq."),
    "rotate": Key("weights", "rotate", "true: rotate the model first, as QuaRot does."),
    "act_bits": Key("activations", "bits", "The bits of activations: 16 (off), 8, 6 or 4."),
    "act_scheme": Key(
        "activations", "scheme", "The range of activations: token (dynamic); static ranges come from a checkpoint."
    ),
    "act_symmetric": Key("activations", "symmetric", "false: asymmetric activations (symmetric unless said)."),
    "act_clip": Key("activations", "clip", "The share of the range of activations that is kept (1)."),
    "kv_bits": Key("kv", "bits", "The bits of the KV cache: 16 (off) or 2 to 8."),
    "kv_scheme": Key("kv", "scheme", "token_head (the paper's), channel_key (KIVI's) or pre_rope (KVQuant's)."),
    "kv_sink_tokens": Key(
        "kv",
        "sink_tokens",
        "The number of leading tokens whose KV is never quantized, although the evaluated model computed them.",
    ),
    "kv_group_size": Key("kv", "group_size", "channel_key: the number of tokens whose keys share a range (32)."),
    "kv_residual_length": Key(
        "kv", "residual_length", "channel_key: KIVI's residual length R, a multiple of kv_group_size (128)."
    ),
    "kv_codebook": Key("kv", "codebook", "pre_rope: the file that `intactkv kv-codebook` writes."),
    "kv_quantize_pivot": Key("kv", "quantize_pivot", "true: quantize the intact pivot's rows like all others."),
    "kv_rotate": Key(
        "kv", "rotate", "token_head: true quantizes keys behind a Hadamard transform of head_dim, as QuaRot does."
    ),
    "kv_clip": Key("kv", "clip", "token_head: the share of each row's range that is kept (1)."),
    "pivot": Key(
        "pivot",
        "source",
        "The tokens in front: bos, prompt, auto, tokens:1+2+3, a PivotKV or prefix file; none: bos, intact=false.",
    ),
    "intact": Key(
        "pivot", "intact", "false: the evaluated model computes the same tokens itself, which is that pivot's baseline."
    ),
    "pivot_transfer": Key(
        "pivot", "transfer", "true: a calibrated PivotKV may be one that was trained for another quantized model."
    ),
    "chat_template": Key("pivot", "chat_template", "A template of model_configs/chat_templates, or a .jinja file."),
    "chat_date": Key("pivot", "chat_date", "The date that chat templates write, for instance 2026-11-28."),
    "backend": Key("", "backend", "The kernels of quantized layers: auto, dense, cpu, triton or gptqmodel."),
    "share_prefix": Key(
        "", "share_prefix", "false: compute every request whole, which is slower and gives the same answers."
    ),
}
"""Every flat key of a cell."""
CELL_KEYS = (*KEYS, "config")
# lm_eval reads the word none as Python's None; for these two keys it is a choice, not an absence.
_NONE_IS_A_VALUE = {"pivot", "weights"}
DEFAULT_GROUP_SIZE = 128
KV_GROUP_SIZE, KV_RESIDUAL_LENGTH = 32, 128


def cell_from_args(args: Mapping[str, Any]) -> CellSpec:
    """The cell of flat arguments; `config` names a YAML that they are laid over.

    Raises ConfigError for an unknown key, a key that does nothing, a missing key or a value out of range.
    """
    flat = flat_arguments(args)
    for key, value in flat.items():
        if isinstance(value, int) and value.bit_length() > 64:  # too long a one could not even be shown
            raise ConfigError(f"{key[:80]}: a number of more than 64 bits; no key takes one")
    if "pretrained" not in flat:
        raise ConfigError("no model given: set pretrained=<folder or hub id>, or config=<name> with one in it")
    flat = _expand(flat)
    _refuse_idle_keys(flat)
    nested: dict[str, Any] = {"model": {}, "weights": {}, "activations": {}, "kv": {}, "pivot": {}}
    for key, value in flat.items():
        part = KEYS[key].part
        (nested[part] if part else nested)[KEYS[key].field] = value
    try:
        return CellSpec.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None


def arguments_of(cell: CellSpec) -> dict[str, Any]:
    """The flat arguments that make this cell, without those that are as they are by default."""
    found: dict[str, Any] = {}
    for key, (part, field, _) in KEYS.items():
        spec: Any = getattr(cell, part) if part else cell
        value = getattr(spec, field)
        if value != type(spec).model_fields[field].default:
            found[key] = value
    return found


def flat_arguments(args: Mapping[str, Any], others: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a cell, those of the YAML that `config` names among them; no value has been judged yet.

    others: keys that may stand beside a cell's, but not in the YAML. Raises ConfigError for an unknown key, first of
    all: what the others say together would be judged without the one that was meant.
    """
    for key in args:
        if key not in CELL_KEYS:
            raise unknown_argument(key, [*CELL_KEYS, *others])
    given = {key: value for key, value in args.items() if _means_something(key, value)}
    if "config" not in given:
        return given
    name = str(given.pop("config"))
    file = load_config(name)
    for key in file:
        if key in others:
            raise ConfigError(f"config={name[:80]}: {key} is lm_eval's, not a cell's; give it beside config=...")
        if key not in KEYS:
            raise ConfigError(f"config={name[:80]}: {unknown_argument(key, list(KEYS))}")
    return _laid_over(file, given)


def unknown_argument(key: str, known: Sequence[str]) -> ConfigError:
    """The error for an argument that nobody reads; a bare number is what lm_eval's parser made of a list."""
    if key.isdigit():
        return ConfigError(f"argument {key[:80]!r}: lm_eval splits arguments at commas; write pivot=tokens:1+319+13563")
    return unknown_key(key, list(known))


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
        full = {"kv_group_size": KV_GROUP_SIZE, "kv_residual_length": KV_RESIDUAL_LENGTH, **full}
    for key in ("pretrained", "revision", "dtype", "reference", "kv_codebook"):
        if key in full:
            full[key] = str(full[key]).removeprefix("torch.")
    return full


# A key that is given explicitly takes with it what the file said about the choice it replaces.
_REPLACES = {
    "weights": ("bits", "group_size", "symmetric", "awq_search", "backend", "rotate"),
    "act_bits": ("act_scheme", "act_symmetric", "act_clip"),
    "kv_bits": (
        "kv_scheme",
        "kv_sink_tokens",
        "kv_group_size",
        "kv_residual_length",
        "kv_codebook",
        "kv_quantize_pivot",
        "kv_rotate",
        "kv_clip",
    ),
    "kv_scheme": ("kv_group_size", "kv_residual_length", "kv_codebook"),
    "pivot": ("intact", "reference", "pivot_transfer"),
}


def _laid_over(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Explicit arguments over a config file's."""
    changed = [key for key in _REPLACES if key in given and given[key] != file.get(key)]
    gone = {part for key in changed for part in _REPLACES[key]}
    if given.get("intact") is False or str(given.get("pivot", "")).lower() == "none":
        gone |= {"reference", "kv_quantize_pivot"}
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
    if "kv_quantize_pivot" in flat and not flat.get("intact", True):
        raise ConfigError(
            "kv_quantize_pivot: does nothing without intact pivot rows; kv_sink_tokens leaves first tokens alone"
        )
    is_kv_file = pivot_kind(flat.get("pivot")) == "kv_file"
    if "reference" in flat and is_kv_file:
        raise ConfigError("reference: does nothing where the pivot's KV comes from a file; drop one of the two")
    if flat.get("pivot_transfer") and not is_kv_file:
        raise ConfigError("pivot_transfer: does nothing without pivot=FILE.safetensors, a calibrated PivotKV")
    if not flat.get("intact", True) and "reference" in flat:
        raise ConfigError("reference: does nothing with intact=false (or pivot=none), where no pivot KV is captured")


def _readable(error: ValidationError) -> str:
    """Pydantic's finding in the user's keys."""
    names = {(place.part, place.field): key for key, place in KEYS.items()}
    found = []
    for item in error.errors():
        path = tuple(str(part) for part in item["loc"])
        key = names.get((path[0], path[1])) if len(path) > 1 else (path[0] if path else "cell")
        shown = f"={item['input']!r}" if len(path) > 0 and not isinstance(item["input"], dict) else ""
        found.append(f"{key or '.'.join(path)}{shown}: {item['msg'].removeprefix('Value error, ')}")
    return "; ".join(found)
