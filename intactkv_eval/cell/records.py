"""Records of cells on disk: their format number, and what of a run's arguments decides no figure."""

from collections.abc import Mapping
from typing import Any

from intactkv_eval.errors import ConfigError

RECORD_FORMAT = "intactkv-run-2"
"""The format of a run's record in lm_eval's results JSON, and of a unit in a sweep's plan."""
NUMBERS_HASH = "numbers_sha256"
"""The key of figures.json under which the hash of the numbers beside it stands."""
SPEED_ONLY = frozenset({"batch_size", "max_batch_size", "device"})
"""Arguments of lm_eval's `hf` that decide how fast a run is, and no figure of it."""


def check_format(record: Mapping[str, Any], where: object) -> None:
    """Raise ConfigError for a record that an earlier release wrote, whose names are others. where: the file."""
    found = record.get("format") if isinstance(record, Mapping) else None
    if found != RECORD_FORMAT:
        raise ConfigError(
            f"{where}: the record of a run has format {str(found)[:40]!r}, expected {RECORD_FORMAT!r}: an earlier "
            "release wrote it. Rewrite the folder once: python scripts/migrate.py FOLDER"
        )
