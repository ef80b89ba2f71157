"""A stranger's code runs where trust_remote_code=True was typed, and then the results say so; never because of a file.

Credentials are no arguments at all.
"""

import json
from contextlib import suppress

import pytest
import yaml

from intactkv_eval.cell.arguments import cell_from_args
from intactkv_eval.cell.trust import check_no_code
from intactkv_eval.errors import ConfigError, IntactKVError
from intactkv_eval.lm.hf_arguments import KNOWN
from intactkv_eval.lm.intactkv_lm import IntactKVLM
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.sweep.runner import Sweep, check_files_of_tasks, given_arguments
from intactkv_eval.sweep.spec import read_sweep

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({ran!r}).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = {kind!r}
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(params=["llama", "own_llama"])
def repository(saved_llama, tmp_path, request):
    """A model with code of its own, under a type that transformers knows or not; and the file that the code writes."""
    ran = tmp_path / "ran.txt"
    (saved_llama / "modeling_own.py").write_text(CODE.format(ran=str(ran), kind=request.param))
    config = json.loads((saved_llama / "config.json").read_text())
    config["model_type"] = request.param
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (saved_llama / "config.json").write_text(json.dumps(config))
    return saved_llama, ran, request.param == "llama"


def test_no_code_runs_unasked(repository):
    folder, ran, known = repository
    if known:
        IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu")
    else:
        with pytest.raises(IntactKVError, match="trust_remote_code"):
            IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu")
    assert not ran.exists()


def test_code_that_is_trusted_runs_and_is_recorded(repository):
    folder, ran, _ = repository
    lm = IntactKVLM(pretrained=str(folder), pivot="bos", device="cpu", trust_remote_code=True)
    assert ran.exists()
    assert lm.get_model_info()["intactkv"]["hf_arguments"]["trust_remote_code"] == "True"


TASK = {"task": "intactkv_demo_ppl", "limit": 4}
QUANTIZE = {"quantize": {"method": "rtn", "bits": 3, "group_size": 32}}


def swept(folder, given, arguments=None):
    file = folder / "theirs.yaml"
    file.write_text(yaml.safe_dump(given))
    return Sweep(file, folder / "out", {}, arguments)


ASKED = {
    "trust_remote_code": ("models", {"trust_remote_code": True}, r"--trust-remote-code \(intactkv eval"),
    "as text": ("models", {"trust_remote_code": "true"}, "runs the Python code"),
    "of the tokenizer": (
        "tasks",
        {**TASK, "metadata": {"trust_remote_code": True, "tokenizer": "org/m"}},
        "runs the Python",
    ),
    "generation": (
        "tasks",
        {**TASK, "gen_kwargs": {"custom_generate": "org/m"}},
        "runs the Python code of a repository",
    ),
    "kernel": ("models", {"attn_implementation": "org/kernel"}, "--model_args attn_implementation=org/kernel"),
    "kernel of a part": ("models", {"attn_implementation": {"text_config": "org/kernel@main"}}, "compiled code"),
    "code_revision": ("models", {"code_revision": "main"}, "it is taken from nowhere here"),
    "writes": ("models", {"offload_folder": "/root/.ssh"}, "writes files where it says"),
    "writes downloads": ("models", {"cache_dir": "/somewhere"}, "--model_args cache_dir=/somewhere"),
    "token": ("models", {"token": "hf_abc"}, "HF_TOKEN"),
    "deep": ("exclude", {"trust_remote_code": True}, "runs the Python code"),
}


@pytest.mark.parametrize(("place", "entry", "message"), ASKED.values(), ids=ASKED)
def test_a_sweep_asks_for_no_code(tmp_path, place, entry, message):
    """The YAML of a stranger ran a checkpoint's Python, and nothing warned."""
    given = {"models": ["m"], "tasks": [TASK]}
    given[place] = [{"pretrained": "m", **entry}] if place == "models" else [entry]
    with pytest.raises(ConfigError, match=message) as ended:
        swept(tmp_path, given)
    assert "theirs.yaml" in str(ended.value)
    with pytest.raises(ConfigError, match=message):  # among the lists of one grid of several
        swept(tmp_path, {"grids": [given]})


def test_a_sweep_runs_no_code_of_a_file(repository, tmp_path):
    folder, ran, _ = repository
    with pytest.raises(ConfigError, match="trust_remote_code runs the Python code"):
        swept(tmp_path, {"models": [{"pretrained": str(folder), "trust_remote_code": True}], "tasks": [TASK]})
    assert not ran.exists()


def test_the_command_line_trusts_for_every_cell_of_a_sweep(saved_llama, tmp_path):
    given = {"models": [str(saved_llama)], "weights": [{}, QUANTIZE], "tasks": [TASK]}
    plain = {unit.key for unit in swept(tmp_path, given).units}
    sweep = swept(tmp_path, given, given_arguments("cache_dir=/tmp/x", trusted=True))
    assert {unit.arguments["cache_dir"] for unit in sweep.units} == {"/tmp/x"}
    assert all(unit.arguments["trust_remote_code"] is True for unit in sweep.units)
    assert all(one.model["trust_remote_code"] for unit in sweep.units for one in unit.preparations)
    assert not plain & {unit.key for unit in sweep.units}, "another code, other results"
    for text in ("trust_remote_code=True", "pretrained=m", "token=hf_x", "nonsense=1", "device=cpu"):
        with pytest.raises(ConfigError, match=text.partition("=")[0]):
            swept(tmp_path, given, given_arguments(text, trusted=True))


def test_what_trusts_nothing_may_stand_in_a_sweep(tmp_path):
    harmless = {"pretrained": "m", "trust_remote_code": False, "attn_implementation": "eager", "dtype": "float32"}
    assert swept(tmp_path, {"models": [harmless], "tasks": [TASK]}).units


def test_a_task_that_is_a_file_runs_code_too(tmp_path):
    """lm_eval runs the functions that a task's YAML names, and takes a path for a task's name."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef docs(d): return d\n")
    task = tmp_path / "evil.yaml"
    text = (shipped_folder("tasks") / "intactkv_demo" / "intactkv_demo_qa.yaml").read_text()
    task.write_text(text.replace("intactkv_demo_qa", "theirs"))
    given = {"models": ["m"], "tasks": [{"task": str(task)}]}
    with pytest.raises(ConfigError, match=r"theirs\.yaml: task .*evil\.yaml is a file, .*--trust-remote-code"):
        swept(tmp_path, given)
    check_files_of_tasks(tmp_path, [str(task)], trusted=True)
    check_files_of_tasks(tmp_path, ["intactkv_demo_qa", "arc_easy", "mmlu@5"], trusted=False)


@pytest.mark.parametrize(
    ("key", "value"), [("trust_remote_code", True), ("attn_implementation", "a/b"), ("token", "hf_x")]
)
def test_a_cell_asks_for_no_code(repository, tmp_path, key, value):
    folder, ran, _ = repository
    file = tmp_path / "cell.yaml"
    file.write_text(yaml.safe_dump({"pretrained": str(folder), key: value}))
    for read in (lambda: cell_from_args({"config": str(file)}), lambda: tokenizer_of({"config": str(file)})):
        with pytest.raises(ConfigError, match=f"{key}") as ended:
            read()
        assert "cell.yaml" in str(ended.value)
    assert not ran.exists()


def test_a_config_cannot_load_a_kernel(saved_llama):
    """transformers takes the attention from config.json too, and a name with a slash is code of the hub."""
    config = json.loads((saved_llama / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        (saved_llama / "config.json").write_text(json.dumps({**config, key: "kernels-community/flash-attn3"}))
        with pytest.raises(
            IntactKVError, match=f"config.json says {key}=kernels-community/flash-attn3, a kernel of the hub"
        ):
            IntactKVLM(pretrained=str(saved_llama), device="cpu")
    (saved_llama / "config.json").write_text(
        json.dumps({**config, "attn_implementation": "kernels-community/flash-attn3"})
    )
    IntactKVLM(pretrained=str(saved_llama), device="cpu", attn_implementation="eager")
    (saved_llama / "config.json").write_text(json.dumps({**config, "attn_implementation": "eager"}))
    IntactKVLM(pretrained=str(saved_llama), device="cpu")


def test_a_tokenizer_of_a_task_asks_nobody(repository, monkeypatch):
    """transformers asks on the terminal whether to run a repository's code, where it is told neither yes nor no."""
    folder, ran, _ = repository
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"auto_map": {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
        )
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with suppress(ValueError, OSError):
        tokenizer_of({"pretrained": str(folder)})
    assert not ran.exists()


def test_what_a_sweep_wrote_is_not_read_as_arguments(saved_llama, tmp_path):
    given = {"models": [str(saved_llama)], "tasks": [TASK]}
    (tmp_path / "out").mkdir()
    plan = [{"key": "a", "task": "t", "hf_arguments": {"trust_remote_code": "True"}}]
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(plan))
    assert all("trust_remote_code" not in unit.arguments for unit in swept(tmp_path, given).units)


def test_every_yaml_of_ours_is_taken():
    for path in [*shipped_folder("sweeps").glob("*.yaml"), *shipped_folder("model_configs").glob("*.yaml")]:
        check_no_code(yaml.safe_load(path.read_text()), path.name, "")
    for path in shipped_folder("sweeps").glob("*.yaml"):
        read_sweep(path.read_text(), path.name)


def test_a_token_is_no_argument(saved_llama, tmp_path, called):
    """It ended in the results, in a sweep's plan, in the log and in the page."""
    assert "token" not in KNOWN
    secret, out = "hf_" + "Ab1" * 11, tmp_path / "out"
    with pytest.raises(ConfigError, match="hf auth login"):
        IntactKVLM(pretrained=str(saved_llama), token=secret)
    flags = ["--tasks", "intactkv_demo_qa", "--limit", "2", "--device", "cpu", "--output_path", out, "--log_samples"]
    for named in ([], ["--model", "hf"]):
        code, err = called("eval", *named, "--model_args", f"pretrained={saved_llama},token={secret}", *flags)
        assert code == 2
        assert "HF_TOKEN" in err
        assert secret not in err
    code, err = called("figures", "--model_args", f"pretrained={saved_llama},api_key={secret}", "--out", out)
    assert code == 2
    assert "HF_TOKEN" in err
    assert secret not in err
    assert not out.exists()


def test_a_record_holds_no_credential(saved_llama):
    lm = IntactKVLM(pretrained=str(saved_llama), device="cpu")
    lm.hf_arguments["think_end_token"] = "hf_" + "Ab1" * 11
    lm.hf_arguments["tokenizer"] = "https://user:password@host/m"
    record = json.dumps(lm.get_model_info()["intactkv"])
    assert "Ab1Ab1" not in record
    assert "password@" not in record
    assert "struck out" in record
