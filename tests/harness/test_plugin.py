"""Registration: lazy, without imports at start-up, and out of the way of an lm_eval that discovers models by itself."""

import subprocess
import sys
from importlib.metadata import entry_points

from intactkv_eval.harness.plugin import NAME, TARGET


def run(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


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
