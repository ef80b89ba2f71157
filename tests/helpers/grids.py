"""A grid over the small llama, as text and as a checked sweep."""

from pathlib import Path

import yaml

from intactkv_eval.sweep.grid import expand
from intactkv_eval.sweep.runner import Sweep
from intactkv_eval.sweep.spec import read_sweep

TASK = {"task": "intactkv_demo_ppl", "limit": 4, "metadata": {"ppl_window": 64}}
RTN = {"weights": "rtn", "bits": 3, "group_size": 32}


def grid(model, **parts):
    return {"models": [str(model)], "weights": [{}, RTN], "tasks": [TASK], **parts}


def units(given):
    return expand(read_sweep(yaml.safe_dump(given), "grid"))


def sweep_of(given, folder):
    file = Path(folder) / "grid.yaml"
    file.write_text(yaml.safe_dump(given))
    return Sweep(file, Path(folder) / "out", {})
