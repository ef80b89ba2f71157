"""lm_eval's --use_cache keeps answers by request text, not by model: two cells on one file would share their answers.

The first cell writes its own identity into the file; another cell is refused.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from intactkv_eval.errors import ConfigError

_KEY = "intactkv_cell"


def guard_response_cache(cache_hook: Any, record: Mapping[str, Any]) -> None:
    """Claim the cache behind `cache_hook` for the cell of `record`. Raises ConfigError where it is another's."""
    answers = getattr(cache_hook, "dbdict", None)
    if answers is None:
        return
    identity = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    owner = answers.get(_KEY)
    if owner is None and len(answers):
        raise ConfigError("--use_cache: this file was filled by another model class; name a new file for this cell")
    if owner not in {None, identity}:
        raise ConfigError("--use_cache: this file holds the answers of another cell; name one file for each cell")
    answers[_KEY] = identity
    answers.commit()
