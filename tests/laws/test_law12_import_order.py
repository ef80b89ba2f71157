"""Law 12: imports run one way, and a start of Python costs nothing.

messages, limits < errors, documents, zip_file, child_process < trust, files < config_files, plain_pickle < config, data, outputs, tensor_file, torch_pickle < cell_arguments, weights < quantize | kernels < model | pivot < cache < calibrate < harness < sweep, report, judge < demo, cli
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "intactkv_eval"
RANK = {
    "messages": -1, "limits": -1, "errors": 0, "documents": 0, "zip_file": 0, "child_process": 0, "trust": 1, "compat": 1, "files": 1, "config_files": 2, "config": 3, "cell_arguments": 4, "formulas": 4, "data": 3, "mt_bench": 4, "tensor_file": 3, "plain_pickle": 2, "outputs": 3, "torch_pickle": 3, "weights": 4, "quantize": 5, "model": 6, "pivot": 6,
    "cache": 7, "calibrate": 8, "harness": 9, "report": 10, "sweep": 11, "judge": 11, "demo": 11, "bench": 12, "pivot_commands": 12, "judge_commands": 12, "sweep_commands": 12, "cli": 13,
}  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(path):
    """(module, inside a function) of every import of our own packages."""
    tree = ast.parse(path.read_text())
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.split(".")[0] in {"intactkv_eval", "intactkv_kernels"}:
                yield name, node in inside


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_rooms(path):
    relative = path.relative_to(PACKAGE)
    here = relative.parts[0].removesuffix(".py")
    if here == "__init__":
        assert not list(imports(path))
        return
    for name, inside in imports(path):
        assert not inside, f"{relative} imports {name} inside a function"
        if name.startswith("intactkv_kernels"):
            assert RANK[here] > RANK["quantize"], f"{relative} imports {name}"
            continue
        there = room(name)
        if there is None:
            continue
        assert RANK[there] < RANK[here] or there == here, f"{relative} imports {name}"


SEAMS = {"transformers": "transformers_api.py", "lm_eval": "lm_eval_api.py"}


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_one_seam_to_each_neighbour(path):
    """What depends on a release of transformers or lm_eval is in one module for each."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in names:
            library, _, inner = name.partition(".")
            if library in SEAMS and path.name not in {SEAMS[library], "plugin.py"}:
                assert library == "transformers", f"{name}: import it from compat/{SEAMS[library]}"
                assert not inner, f"{name}: import it from compat/{SEAMS[library]}"
    assert path.name == SEAMS["transformers"] or "past_key_values" not in text


def test_kernels_know_nothing_of_us():
    for path in (ROOT / "kernels" / "intactkv_kernels").rglob("*.py"):
        assert not [name for name, _ in imports(path) if name.startswith("intactkv_eval")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_pivot_knows_nothing_of_weights():
    for path in (PACKAGE / "pivot").glob("*.py"):
        if path.name != "basis.py":
            assert not [name for name, _ in imports(path) if room(name) in {"weights", "quantize", "model"}]


@pytest.mark.parametrize("module", ["intactkv_eval.harness.plugin", "intactkv_eval.report.tables", "intactkv_eval.cli"])
def test_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
