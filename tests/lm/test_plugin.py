"""Registration: lazy, without imports at start-up, and out of the way of an lm_eval that discovers models by itself."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from intactkv_eval.errors import ConfigError
from intactkv_eval.lm.evaluate_task import check_known
from intactkv_eval.lm.plugin import NAME, TARGET


def run(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


def test_lm_eval_knows_the_name_without_importing_us():
    code = (
        "import sys, lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'intactkv' in model_registry\n"
        "assert 'intactkv_eval.lm.intactkv_lm' not in sys.modules\n"
        "assert not any(f.__name__ == '_Finder' for f in sys.meta_path if isinstance(f, type))\n"
        "print(model_registry.get('intactkv').__name__)"
    )
    assert run(code) == "IntactKVLM"


def test_a_name_that_is_there_already_is_left_alone():
    code = (
        "import lm_eval.models\nfrom lm_eval.api.registry import model_registry\n"
        "from intactkv_eval.lm import plugin\nplugin.register(); plugin.install()\n"
        "print(model_registry._objs['intactkv'])"
    )
    assert run(code) == TARGET


def test_the_entry_point_is_declared():
    declared = entry_points(group="lm_eval.models")
    assert [point.value for point in declared if point.name == NAME] == [TARGET]


def test_start_up_imports_nothing_heavy():
    code = (
        "import sys; print('intactkv_eval.lm.plugin' in sys.modules, 'torch' in sys.modules, 'lm_eval' in sys.modules)"
    )
    assert run(code) == "True False False"


def test_an_lm_eval_that_discovers_models_is_left_alone(tmp_path):
    """A package that stands in for such a release: its registry asks for entry points when a model is wanted."""
    for name, text in {
        "lm_eval/__init__.py": "",
        "lm_eval/models/__init__.py": "",
        "lm_eval/api/__init__.py": "",
        "lm_eval/api/registry.py": "from importlib.metadata import entry_points\n"
        "class Registry(dict):\n    def register(self, *names, target=None):\n        raise AssertionError(names)\n"
        "model_registry = Registry()\n"
        "def get_model(name):\n    return next(p for p in entry_points(group='lm_eval.models') if p.name == name).value\n",
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import lm_eval.models; assert lm_eval.__file__.startswith(sys.path[0])\n"
        "from lm_eval.api.registry import get_model\nprint(get_model('intactkv'))"
    )
    assert run(code) == TARGET


def test_the_hook_can_be_left_out():
    """INTACTKV_NO_HOOK=1: lm_eval does not know the name, and our own command does."""
    code = (
        "import sys, lm_eval.models\nfrom lm_eval.api.registry import model_registry\n"
        "assert 'intactkv' not in model_registry\n"
        "import intactkv_eval.commands.evaluate\nprint('intactkv' in model_registry)"
    )
    assert run(code, INTACTKV_NO_HOOK="1") == "True"


LM_EVAL = {"lm_eval/__init__.py": "", "lm_eval/models/__init__.py": "LOADED = True\n", "lm_eval/api/__init__.py": ""}
UNLIKE = {
    "no registry": {},
    "no such name": {"lm_eval/api/registry.py": "models = {}\n"},
    "another method": {
        "lm_eval/api/registry.py": "class R(dict):\n    def register(self, name, cls): pass\nmodel_registry = R()\n"
    },
    "no mapping": {"lm_eval/api/registry.py": "model_registry = None\n"},
    "it raises": {"lm_eval/api/registry.py": "raise OSError('broken')\n"},
    "no UTF-8": {"lm_eval/api/registry.py": b"# -*- coding: latin-1 -*-\n# \xe9\nmodel_registry = None\n"},
}


def written(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


@pytest.mark.parametrize("files", UNLIKE.values(), ids=UNLIKE)
def test_an_lm_eval_unlike_any_other_is_imported_as_without_us(tmp_path, files):
    """A registry that is missing, other, broken or in another encoding ended the import of lm_eval in our traceback."""
    written(tmp_path, {**LM_EVAL, **files})
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom intactkv_eval.lm import plugin\n"
        "plugin.install(); import lm_eval.models\nprint(lm_eval.models.LOADED, plugin.missing() is not None)"
    )
    assert run(code) == "True True"


@pytest.mark.parametrize(
    "loader",
    [
        "class L:\n    __slots__ = ()\n    def create_module(self, spec): return None\n    def exec_module(self, m): m.LOADED = True\n",
        "class L:\n    def load_module(self, name):\n        m = types.ModuleType(name); m.LOADED = True; sys.modules[name] = m; return m\n",
        "class L:\n    @classmethod\n    def create_module(cls, spec): return None\n    @classmethod\n    def exec_module(cls, m): m.LOADED = True\n",
    ],
    ids=["slots", "old", "shared"],
)
@pytest.mark.filterwarnings("ignore")
def test_a_loader_of_another_kind_is_left_alone(tmp_path, loader):
    """A loader whose attributes cannot be set, one of the old protocol, and a class that loads other modules too."""
    written(tmp_path, {"lm_eval/__init__.py": ""})
    made = "L" if "classmethod" in loader else "L()"
    code = (
        f"import sys, types, importlib.machinery as machinery; sys.path.insert(0, {str(tmp_path)!r})\n{loader}"
        "class F:\n    @staticmethod\n    def find_spec(name, path=None, target=None):\n"
        f"        if name == 'lm_eval.models': return machinery.ModuleSpec(name, {made})\n"
        "sys.meta_path.insert(0, F)\nfrom intactkv_eval.lm import plugin\nplugin.uninstall(); plugin.install()\n"
        "held = L.__dict__.get('exec_module')\nimport lm_eval.models\n"
        "print(lm_eval.models.LOADED, L.__dict__.get('exec_module') is held)"
    )
    assert run(code) == "True True"


def test_an_error_of_lm_eval_itself_is_its_own(tmp_path):
    written(tmp_path, {**LM_EVAL, "lm_eval/models/__init__.py": "raise RuntimeError('theirs')\n"})
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom intactkv_eval.lm import plugin\nplugin.install()\n"
        "try:\n    import lm_eval.models\nexcept RuntimeError as error:\n    print(error)"
    )
    assert run(code) == "theirs"


def test_the_command_says_why_the_name_is_missing(monkeypatch):
    def refuses(_name):
        raise KeyError("unlike")

    monkeypatch.setattr("lm_eval.api.registry.get_model", refuses)
    with pytest.raises(ConfigError, match=r"does not take the model intactkv .*KeyError.*docs/releases\.md"):
        check_known()
