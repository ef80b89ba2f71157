"""Rewrites files of earlier releases in place: python scripts/migrate.py FOLDER ...

Results JSON, plans of sweeps, prefix files and records of trained pivots get today's names and format numbers; no
figure is changed. What has them already is left alone. Files of tensors (PivotKV, KV codebooks) are made anew instead.
"""

import json
import sys
from pathlib import Path
from typing import Any

from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.pivot.prefix_file import FORMAT as PREFIX_FORMAT
from intactkv_eval.storage.files import write_atomic

ARGUMENTS = {"kv_levels": "kv_codebook", "kv_keep": "kv_sink_tokens", "kv_group": "kv_group_size",
             "kv_recent": "kv_residual_length"}  # fmt: skip
KV_FIELDS = {"levels": "codebook", "keep": "sink_tokens", "group": "group_size", "recent": "residual_length"}
TRAINING = {"rate": "learning_rate", "batch": "batch_size", "clip": "max_grad_norm", "tokens": "max_tokens",
            "assistant": "min_assistant_tokens", "master": "param_dtype"}  # fmt: skip
SEARCH = {"most": "max_prefix_tokens", "least": "min_reduction"}
OLD_PREFIX = "intactkv-pivots-1"


def migrated(value: Any) -> Any:
    """A JSON value with today's names."""
    if isinstance(value, list):
        return [migrated(part) for part in value]
    if not isinstance(value, dict):
        return value
    names = {**ARGUMENTS, "full_nats": "full_nll"}
    switches = {"kv_exempt": "kv_quantize_pivot"}
    if {"bits", "scheme", "keep"} <= value.keys():
        names |= KV_FIELDS
        switches["exempt"] = "quantize_pivot"
    if {"pivots", "prefix"} <= value.keys() or "blocks" in value:
        names["nats"] = "nll"
    if {"rate", "patience"} <= value.keys():
        names |= TRAINING
    if {"threshold", "least"} <= value.keys():
        names |= SEARCH
    renamed = {names.get(key, key): migrated(part) for key, part in value.items()}
    for old, new in switches.items():
        if isinstance(renamed.get(old), bool):
            renamed[new] = not renamed.pop(old)
    if renamed.get("format") == OLD_PREFIX:
        renamed["format"] = PREFIX_FORMAT
    return renamed


def with_format(content: Any) -> Any:
    """The record of a results file, or the units of a plan, with their format."""
    units = content if isinstance(content, list) else []
    config = content.get("config") if isinstance(content, dict) else None
    if isinstance(config, dict) and isinstance(config.get("intactkv"), dict):
        units = [config["intactkv"]]
    for unit in units:
        if isinstance(unit, dict) and "cell" in unit:
            unit["format"] = RECORD_FORMAT
    return content


def migrate(folder: Path) -> int:
    """Rewrite what needs it below a folder; how many files that were."""
    count = 0
    for path in sorted(folder.rglob("*.json")):
        before = path.read_text(encoding="utf-8")
        content = json.loads(before)
        after = with_format(migrated(content))
        if after != json.loads(before):
            text = json.dumps(after, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
            write_atomic(path, lambda partial, text=text: partial.write_text(text, encoding="utf-8"))
            count += 1
    for path in sorted(folder.rglob("*.csv")):
        text = path.read_text(encoding="utf-8")
        if "held_out_nats" in text.partition("\n")[0]:
            new = text.replace("held_out_nats", "held_out_nll", 1)
            write_atomic(path, lambda partial, new=new: partial.write_text(new, encoding="utf-8"))
            count += 1
    return count


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {migrate(Path(name))} files rewritten")
