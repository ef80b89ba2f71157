"""What `intactkv capture` does: a full-precision model in, its pivot's KV in a file out."""

from pathlib import Path
from typing import Any

from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.lm.hf_arguments import checked_cell
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.files import check_writable


def capture_to_file(arguments: dict[str, Any], loading: dict[str, Any], out: Path) -> PivotKV:
    """Capture the pivot of a full-precision model and save it. Raises ConfigError, PivotError or OSError."""
    checked_cell(arguments, loading)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: a PivotKV file ends in .safetensors")
    check_writable(out.parent)
    lm = IntactKVLM(**arguments, **loading)
    pivot = lm.pivoted_model.pivot
    if pivot is None:
        raise PivotError("pivot=none has no KV to save: name bos, prompt or tokens:...")
    pivot.save(out)
    return pivot
