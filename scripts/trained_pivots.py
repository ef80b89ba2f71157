"""Keeps trained pivots as records: trained_pivots.py keep TARGET FILE.safetensors ..., or table FOLDER OUT.md.

A record is what a PivotKV says of its training (quantized model, data by hash, settings, held-out measures) and the
log of every step; the rows themselves are not kept. The table is made of the records alone.
"""

import json
import sys
from pathlib import Path

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.kv import PivotKV

MEASURES = (("blocks", "{:.1f}"), ("last", "{:.1f}"), ("nll", "{:.3f}"))
HEAD = ("quantized model and pivot", "pivot tokens", "loss of all layers", "Δ", "of the last layer", "Δ",
        "nll a token", "Δ", "in full precision")  # fmt: skip
FOOT = """
Held-out conversations, before and after training: the sum over layers of mean((y - t)² / 2) between quantized and
full-precision outputs of the assistant's tokens, that of the last layer, and the mean log-loss of those tokens, in the
full-precision model too. Rows: the records in this folder's `{}`, with their settings.
"""


def keep(target: Path, files: list[Path]) -> None:
    """Write a record of each trained PivotKV and copy the log beside it. Raises PivotError for one without."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        pivot = PivotKV.load(file)
        made = pivot.fingerprint.calibrated
        if made is None:
            raise PivotError(f"{file}: holds what the full-precision model computes, not trained rows")
        record = {**made.model_dump(), "cell": made.cell.rpartition("/")[2], "token_ids": pivot.token_ids}
        content = json.dumps(record, indent=1, sort_keys=True) + "\n"
        (target / f"{file.stem}.json").write_text(content)
        (target / f"{file.stem}.csv").write_text(file.with_suffix(".csv").read_text())


def table(folder: Path) -> str:
    """Markdown: one row for each record."""
    lines = [" | ".join(("", *HEAD, "")).strip(), "| --- " + "| ---: " * (len(HEAD) - 1) + "|"]
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text())
        row = [file.stem, str(len(record["token_ids"]))]
        for name, form in MEASURES:
            before, after = record["held_out"][name]
            change = f"{after - before:+.3f}" if name == "nll" else f"{100 * (after / before - 1):+.1f} %"
            row += [f"{form.format(before)} → {form.format(after)}", change]
        row.append("" if record["full_nll"] is None else f"{record['full_nll']:.3f}")
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n" + FOOT.format(folder.name)


if __name__ == "__main__":
    if sys.argv[1] == "keep":
        keep(Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
    else:
        Path(sys.argv[3]).write_text(table(Path(sys.argv[2])))
