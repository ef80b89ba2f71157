"""The YAML files of cells: flat keys, by path or by their name in model_configs/. Knows no key."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

from intactkv_eval.cell.trust import check_no_code
from intactkv_eval.errors import ConfigError
from intactkv_eval.storage.documents import parse_yaml
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.storage.limits import read_bytes


def load_config(name: str) -> dict[str, Any]:
    """The flat keys of a YAML: a path, or a name in model_configs/. Raises ConfigError where it cannot be read."""
    path = Path(name)
    if path.suffix not in {".yaml", ".yml"}:
        path = shipped_folder("model_configs") / f"{name}.yaml"
        if not path.is_file():
            known = config_names()
            near = get_close_matches(name, known, n=3) or known
            raise ConfigError(f"config={name!r}: no such cell in model_configs/; near names: {', '.join(near)}")
    try:
        loaded = parse_yaml(read_bytes(path).decode("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {path}: cannot be read ({error})") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ConfigError(f"config {path}: expected a mapping of keys such as pretrained, weights, bits")
    check_no_code(loaded, f"config {path}", "--model_args config=...,{key}={value}")
    if "config" in loaded:
        raise ConfigError(f"config {path}: a config cannot name another config")
    return loaded


def config_names() -> list[str]:
    """The names that `config=` knows, sorted."""
    return sorted(path.stem for path in shipped_folder("model_configs").glob("*.yaml"))
