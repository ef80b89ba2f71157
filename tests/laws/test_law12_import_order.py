"""Law 12: imports run one way, and a start of Python costs nothing. ORDER is the one place where the order is written."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "intactkv_eval"
FILES = sorted(PACKAGE.rglob("*.py"))

ORDER = (
    ("sanitize",),
    ("errors",),
    ("storage",),
    ("compat",),
    ("cell",),
    ("data",),
    ("chat", "mt_bench"),
    ("weights",),
    ("model",),
    ("pivot",),
    ("kv_quant",),
    ("kv_cache",),
    ("quantize", "training"),
    ("inference",),
    ("assemble",),
    ("lm",),
    ("lm_tasks",),
    ("report",),
    ("judge",),
    ("commands",),
    ("sweep",),
    ("demo",),
    ("bench",),
    ("cli",),
)
"""A room may import the rooms above it. Rooms in one row do not know each other."""
KERNELS_BELOW = "weights"  # intactkv_kernels imports nothing of ours; the rooms from here on may import it
# Rooms that know less than their place in the order allows.
KNOWS_ONLY = {
    "mt_bench": {"errors", "storage", "data"},
    "report": {"sanitize", "errors", "storage", "cell"},
    "judge": {"sanitize", "errors", "storage", "data", "mt_bench", "report"},
}
MAY_IMPORT_INSIDE = {"cli"}  # a command imports its body when it is called
SEAMS = {"transformers": "transformers_api.py", "lm_eval": "lm_eval_api.py"}
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def module_of(path, package=PACKAGE):
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(module, names, inside a function) of every import of our own packages."""
    tree = ast.parse(path.read_text())
    inside = {child for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [(node.module, [alias.name for alias in node.names])]
        else:
            continue
        for name, names in found:
            if name.split(".")[0] in {"intactkv_eval", "intactkv_kernels"}:
                yield name, names, node in inside


def arrows(package=PACKAGE):
    """(importing file, imported file) as modules below the package, and whether it is inside a function."""
    files = {module_of(path, package): path for path in sorted(package.rglob("*.py"))}
    for module, path in files.items():
        for name, names, inside in imports(path):
            below = name.removeprefix("intactkv_eval").removeprefix(".")
            if name.startswith("intactkv_kernels"):
                yield module, name, inside
                continue
            targets = {f"{below}.{one}".removeprefix(".") for one in names} & files.keys() or {below}
            yield from ((module, target, inside) for target in targets if target)


def wrong_arrows(package=PACKAGE):
    """Every import that the order does not allow, as a line."""
    wrong = []
    for module, target, inside in arrows(package):
        here, there = module.split(".")[0], target.split(".")[0]
        if not here:
            wrong.append(f"__init__ imports {target}")
        elif inside and here not in MAY_IMPORT_INSIDE:
            wrong.append(f"{module} imports {target} inside a function")
        elif there == "intactkv_kernels":
            if RANK[here] < RANK[KERNELS_BELOW]:
                wrong.append(f"{module} imports {target}, which only {KERNELS_BELOW} and above may")
        elif here != there and (RANK[there] >= RANK[here] or there not in KNOWS_ONLY.get(here, {there})):
            wrong.append(f"{module} imports {target}")
    return wrong


def circle(package=PACKAGE):
    """A circle of files that import each other, or None."""
    graph = {}
    for module, target, _ in arrows(package):
        graph.setdefault(module, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_every_room_has_its_place():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert rooms == set(RANK)


def test_imports_run_one_way():
    assert wrong_arrows() == []
    assert circle() is None


@pytest.mark.parametrize(
    ("files", "wrong"),
    [
        ({"cell/a.py": "from intactkv_eval.lm.b import c", "lm/b.py": ""}, "cell.a imports lm.b"),
        ({"lm/b.py": "def f():\n    from intactkv_eval.cell import a", "cell/a.py": ""}, "inside a function"),
        ({"report/a.py": "import intactkv_eval.model.b", "model/b.py": ""}, "report.a imports model.b"),
        ({"chat/a.py": "import intactkv_kernels.cpu"}, "chat.a imports intactkv_kernels"),
        ({"chat/a.py": "from intactkv_eval.mt_bench import b", "mt_bench/b.py": ""}, "chat.a imports mt_bench"),
    ],
)
def test_a_planted_arrow_back_is_seen(tmp_path, files, wrong):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = wrong_arrows(tmp_path)
    assert len(found) == 1
    assert wrong in found[0]


def test_a_planted_circle_is_seen(tmp_path):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "a.py").write_text("from intactkv_eval.lm import b")
    (tmp_path / "lm" / "b.py").write_text("from intactkv_eval.lm.c import d")
    (tmp_path / "lm" / "c.py").write_text("from intactkv_eval.lm.a import e")
    assert set(circle(tmp_path)) == {"lm.a", "lm.b", "lm.c"}


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
        assert not [name for name, _, _ in imports(path) if name.startswith("intactkv_eval")]
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    "module",
    [
        "intactkv_eval.lm.plugin",
        "intactkv_eval.report.page",
        "intactkv_eval.report.tables",
        "intactkv_eval.judge.entries",
        "intactkv_eval.mt_bench.questions",
        "intactkv_eval.cli.main",
    ],
)
def test_no_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_class_name_once():
    """A name means one thing in the package."""
    places = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(module_of(path))
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_files_and_functions_are_small():
    """At most 300 lines a file; at most 60 a function outside cli/, whose options are its parameters."""
    large = []
    for path in FILES:
        text = path.read_text()
        if len(text.splitlines()) > 300:
            large.append(f"{module_of(path)}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and module_of(path).split(".")[0] != "cli":
                lines = node.end_lineno - node.lineno + 1
                large += [f"{module_of(path)}.{node.name}: {lines} lines"] if lines > 60 else []
    assert large == []
