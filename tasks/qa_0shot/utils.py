"""The data of lm_eval's own question answering tasks, from the hub or from the local mirror."""

from typing import Any

from intactkv_eval.data.hub import load_dataset


def load(hub_path: str, hub_name: str | None = None, **_: Any) -> Any:
    """A whole data set, as lm_eval's tasks expect it."""
    return load_dataset(hub_path, hub_name)
