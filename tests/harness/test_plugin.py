"""Registration: lazy, without imports at start-up, and out of the way of an lm_eval that discovers models by itself."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

from intactkv_eval.harness.plugin import NAME, TARGET


def run(code, **environment):
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    return done.stdout.strip()


def test_lm_eval_knows_the_name_without_importing_us():
    code = (
        "import sys, lm_eval.models\n"
        "from lm_eval.api.registry import model_registry\n"
        "assert 'intactkv' in model_registry\n"
        "assert 'intactkv_eval.harness.lm' not in sys.modules\n"
        "assert not any(f.__name__ == '_Finder' for f in sys.meta_path if isinstance(f, type))\n"
        "print(model_registry.get('intactkv').__name__)"
    )
    assert run(code) == "IntactKVLM"


def test_a_name_that_is_there_already_is_left_alone():
    code = (
        "import lm_eval.models\nfrom lm_eval.api.registry import model_registry\n"
        "from intactkv_eval.harness import plugin\nplugin.register(); plugin.install()\n"
        "print(model_registry._objs['intactkv'])"
    )
    assert run(code) == TARGET


def test_the_entry_point_is_declared():
    declared = entry_points(group="lm_eval.models")
    assert [point.value for point in declared if point.name == NAME] == [TARGET]


def test_start_up_imports_nothing_heavy():
    code = "import sys; print('intactkv_eval.harness.plugin' in sys.modules, 'torch' in sys.modules, 'lm_eval' in sys.modules)"
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
    """INTACTKV_HOOK=off: lm_eval does not know the name, and our own command does."""
    code = (
        "import sys, lm_eval.models\nfrom lm_eval.api.registry import model_registry\n"
        "assert 'intactkv' not in model_registry\n"
        "import intactkv_eval.harness.command\nprint('intactkv' in model_registry)"
    )
    assert run(code, INTACTKV_HOOK="off") == "True"
