"""The wheel: what it holds, and that it works without the checkout."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OTHERS = {
    "", "dequantize.c", "planes.c", "planes.h", "planes_tiles.c", "published/figures.csv", "report/page.html.jinja",
    "model_configs/chat_templates/llama-2.jinja", "model_configs/chat_templates/vicuna_v1.1.jinja", "tasks/mmlu/_template", "tasks/mt_bench/_bench",
    "tasks/ppl/_rolling", "tasks/ppl/_window",
    *(f"tasks/intactkv_demo/data/{name}" for name in ("README.md", "dialogues.jsonl", "prose.jsonl", "questions.jsonl")),
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (file,) = out.glob("*.whl")
    return file


def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"intactkv_eval", "intactkv_kernels", "intactkv_eval_hook.pth", "intactkv_eval-0.1.0.dev0.dist-info"}
    assert not [name for name in names if re.search(r"(^|/)(tests?|__pycache__)/|/(test_|conftest)", name)]
    others = {
        name.partition("/")[2] for name in names if "dist-info/" not in name and not name.endswith((".py", ".yaml"))
    }
    assert others == OTHERS, "what is no code and no settings is listed, so that no data of others comes in"
    for needed in ("tasks/ppl/ppl_wikitext2.yaml", "tasks/intactkv_demo/data/prose.jsonl", "sweeps/table1.yaml", "published/figures.csv", "model_configs/llama-2-7b-w3g128.yaml",
                   "model_configs/chat_templates/vicuna_v1.1.jinja", "lm/intactkv_lm.py"):  # fmt: skip
        assert f"intactkv_eval/{needed}" in names
    c_files = {"dequantize.c", "planes.h", "planes.c", "planes_tiles.c"}
    assert {f"intactkv_kernels/{name}" for name in c_files} <= set(names)
    count = len(list((ROOT / "tasks").rglob("*.yaml")))
    assert sum(name.startswith("intactkv_eval/tasks/") and name.endswith(".yaml") for name in names) == count


def test_it_works_installed_apart_from_the_checkout(wheel, tmp_path):
    """Unpacked alone, before the editable install on the path: registration, tasks and cells are found in it."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import site, sys; site.addsitedir(sys.argv[1]); sys.path.insert(0, sys.argv[1])\n"
        "for name in [m for m in sys.modules if m.startswith('intactkv')]: del sys.modules[name]\n"
        "import intactkv_eval; assert intactkv_eval.__file__.startswith(sys.argv[1]), intactkv_eval.__file__\n"
        "from intactkv_eval.cell.config_files import config_names\n"
        "from intactkv_eval.storage.files import shipped_folder\n"
        "assert str(shipped_folder('tasks')).startswith(sys.argv[1])\nassert len(config_names()) > 15\n"
        "import lm_eval.models; from lm_eval.api.registry import get_model\n"
        "model = get_model('intactkv'); import inspect; assert inspect.getfile(model).startswith(sys.argv[1])"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, env=env, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
