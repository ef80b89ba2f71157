"""The page of the architecture: the tree of the package, the order of its imports, one line a room.

    python scripts/architecture.py [--write docs/architecture.md]

The order is that of tests/laws/test_law12_import_order.py, the one place where it is written; the lines are the rooms'
own docstrings. tests/test_architecture.py fails where the page says anything else.
"""

import argparse
import ast
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "intactkv_eval"
LAW = ROOT / "tests" / "laws" / "test_law12_import_order.py"

HEAD = """# Architecture

<!-- written by scripts/architecture.py -->
An evaluation goes one way. A cell (`cell/`) and the source of its models (`assemble/source.py`) go into `load_cell`,
which resolves the tokens in front, loads the model, brings the pivot into its basis, and quantizes the model. The model
behind the pivot (`inference/`) answers lm_eval's requests (`lm/`). The report (`report/`) reads lm_eval's results JSON.

## The order of imports
A room imports only rooms above it in this list; rooms in one line do not know each other. `intactkv_kernels` imports
nothing of this package; {kernels} and the rooms below it may import it. No file imports another inside a function,
except in `cli/`, where a command imports its body when it is called. No two files import each other, in a
circle of any length.

```
{order}
```

## The rooms
| room | what it is, and what it knows nothing of | files |
|---|---|---|
{rooms}

## Where a change goes
| change | file |
|---|---|
| a KV scheme | one file in `kv_quant/`, one line in `kv_quant/quantizer.py` |
| a checkpoint format | one file in `weights/formats/`, one line in its `__init__.py` |
| a quantizer | one file in `quantize/`, one line in `quantize/job.py` |
| a kernel | one file in `kernels/intactkv_kernels/`, one line in `dispatch.py` |
| a model family | one entry in `model/families.py`, one line in `tests/model/test_families.py` |
| how BOS is stripped | `lm/pivot_framing.py` |
| how a prefix is shared | `inference/scoring/prefix_sharing.py` |
| what is stored in a run's record | `lm/run_record.py` |
| a column in the report | `report/tables.py` |
| a command | one file in `cli/` (options), one in `commands/` (body), one line in `cli/main.py` |
| a task | one folder in `tasks/`; its Python in `lm_tasks/` |
| a release of transformers, lm_eval or peft | one module in `compat/` |
"""


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def page() -> str:
    """The whole page."""
    law = runpy.run_path(str(LAW), run_name="law12")
    rooms = []
    for room in (room for row in law["ORDER"] for room in row):
        folder = PACKAGE / room
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]
        path, name = (folder / "__init__.py", f"`{room}/`") if folder.is_dir() else (files[0], f"`{room}.py`")
        rooms.append(f"| {name} | {summary(path)} | {sum(file.name != '__init__.py' for file in files)} |")
    order = "\n".join(", ".join(row) for row in law["ORDER"])
    return HEAD.format(kernels=f"`{law['KERNELS_BELOW']}`", order=order, rooms="\n".join(rooms))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", type=Path, help="the page to write; printed if none is given")
    chosen = options.parse_args()
    if chosen.write:
        chosen.write.write_text(page(), encoding="utf-8")
    else:
        print(page())
