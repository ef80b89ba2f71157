"""What `intactkv capture` does: a full-precision model in, its pivot's KV in a file out."""

from pathlib import Path
from typing import Any

from intactkv_eval.assemble.load_cell import load_cell
from intactkv_eval.assemble.open_source import open_source
from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.files import check_writable


def capture_to_file(arguments: dict[str, Any], loading: dict[str, Any], out: Path) -> PivotKV:
    """Capture the pivot of a full-precision model and save it.

    Args:
        arguments: The keys of the cell.
        loading: device and trust_remote_code, as `open_source` takes them.
        out: The .safetensors file to write.

    Raises:
        ConfigError, PivotError, CheckpointError, OSError: Before anything is written.
    """
    cell = cell_from_args(arguments)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: a PivotKV file ends in .safetensors")
    check_writable(out.parent)
    pivot = load_cell(cell, open_source(cell, **loading)).pivoted.pivot
    if pivot is None:
        raise PivotError("pivot=none has no KV to save: name bos, prompt or tokens:...")
    pivot.save(out)
    return pivot
