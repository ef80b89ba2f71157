"""How flat arguments become a cell (config.py).

The flat keys are those of lm_eval's --model_args, and a YAML of model_configs/ holds the same keys. Every key either
acts or is an error: unknown keys, keys that do nothing in this cell, and values out of range are refused with the
nearest right name. Knows no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from intactkv_eval.cell.config_files import load_config
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.errors import ConfigError, unknown_key

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
    "pivot_transfer": ("pivot", "transfer"),
    "chat_template": ("pivot", "chat_template"),
    "chat_date": ("pivot", "chat_date"),
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
        part, field = _PLACES[key]
        (nested[part] if part else nested)[field] = value
    try:
        return CellSpec.model_validate(nested)
    except ValidationError as error:
        raise ConfigError(_readable(error)) from None


def arguments_of(cell: CellSpec) -> dict[str, Any]:
    """The flat arguments that make this cell, without those that are as they are by default."""
    found: dict[str, Any] = {}
    for key, (part, field) in _PLACES.items():
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
        if key not in _PLACES:
            raise ConfigError(f"config={name[:80]}: {unknown_argument(key, list(_PLACES))}")
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
    "pivot": ("intact", "reference", "pivot_transfer"),
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
    if flat.get("pivot_transfer") and not str(flat.get("pivot")).endswith(".safetensors"):
        raise ConfigError("pivot_transfer: does nothing without pivot=FILE.safetensors, a calibrated PivotKV")
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
