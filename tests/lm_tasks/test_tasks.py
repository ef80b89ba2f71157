"""Our tasks: protocols against other computations, data sources, every YAML."""

import csv
from math import exp

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.tiny import BOS
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from intactkv_eval.compat.lm_eval_api import ConfigurableTask, task_base
from intactkv_eval.data.hub import load_dataset
from intactkv_eval.errors import ConfigError, DataError
from intactkv_eval.lm_tasks.perplexity import cut_windows
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of
from intactkv_eval.storage.files import shipped_folder

TASKS = shipped_folder("tasks")
TEXT = [f"line {i} of a small text.\n" if i % 3 else "" for i in range(60)]


def evaluate(tasks, folder, metadata=None, **arguments):
    manager = TaskManager(
        include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(folder), **(metadata or {})}
    )
    arguments = {"pretrained": str(folder), "dtype": "float32", "pivot": "none", **arguments}
    found = simple_evaluate(
        "intactkv", arguments, tasks, batch_size=4, device="cpu", task_manager=manager, bootstrap_iters=2
    )
    by_name = {name.rpartition("::")[2]: figures for name, figures in found["results"].items()}
    return {**found, "results": by_name}  # the newest lm_eval names a task behind its group


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    root = tmp_path / "mirror"
    monkeypatch.setenv("INTACTKV_DATA", str(root))

    def write(repository, config, splits):
        folder = root / repository
        (folder / config).mkdir(parents=True, exist_ok=True)
        files = []
        for split, rows in splits.items():
            Dataset.from_list(rows).to_parquet(folder / config / f"{split}.parquet")
            files.append({"split": split, "path": f"{config}/{split}.parquet"})
        card = {"configs": [{"config_name": config, "data_files": files}]}
        (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")

    write("Salesforce/wikitext", "wikitext-2-raw-v1", {"test": [{"text": line} for line in TEXT]})
    write("allenai/c4", "en", {"validation": [{"text": f"document {i} says something"} for i in range(50)]})
    write(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        {"test": [{"sentence": f"no it was n't {i}"} for i in range(50)]},
    )
    return root


def test_perplexity_is_the_papers(saved_llama, mirror, tokenizer):
    """Windows by hand: first token replaced by BOS, its prediction left out, mean of means, exponentiated."""
    found = evaluate(["ppl_wikitext2"], saved_llama, {"ppl_window": 64})
    ids = torch.tensor(tokenizer("\n\n".join(TEXT)).input_ids)
    model = AutoModelForCausalLM.from_pretrained(saved_llama)
    means = []
    for start in range(0, len(ids) - 63, 64):
        window = ids[start : start + 64].clone()
        window[0] = BOS
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].log_softmax(-1)
        means.append(-log_probs[1:-1].gather(1, window[2:, None]).mean().item())
    assert found["results"]["ppl_wikitext2"]["perplexity,none"] == pytest.approx(exp(sum(means) / len(means)), rel=1e-5)
    assert found["configs"]["ppl_wikitext2"]["metadata"]["protocol"] == "bos-window-64"
    assert found["n-samples"]["ppl_wikitext2"]["effective"] == len(means)


def test_protocols_side_by_side(saved_llama, mirror):
    names = [f"ppl_{corpus}_protocols" for corpus in ("wikitext2", "c4", "ptb")]
    found = evaluate(names, saved_llama, {"ppl_window": 64})["results"]
    for corpus in ("wikitext2", "c4", "ptb"):
        assert found[f"ppl_{corpus}"]["perplexity,none"] > 1
        assert found[f"ppl_{corpus}_rolling"]["word_perplexity,none"] > 1


def test_windows():
    assert cut_windows(list(range(10)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut_windows(list(range(10)), 4, 1) == [[0, 1, 2, 3]]
    with pytest.raises(DataError, match="3 tokens"):
        cut_windows([1, 2, 3], 4)


def test_a_window_longer_than_the_model_is_an_error(saved_llama, mirror):
    with pytest.raises(ConfigError, match="does not fit"):
        evaluate(["ppl_wikitext2"], saved_llama, {"ppl_window": 200})


def test_a_context_is_never_cut_in_a_window(saved_llama, mirror):
    with pytest.raises(ConfigError, match="ppl_window"):
        evaluate(["ppl_wikitext2"], saved_llama, {"ppl_window": 128}, pivot="tokens:256+3+4")


def test_missing_mirror_says_which_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("INTACTKV_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no such folder"):
        load_dataset("cais/mmlu")
    monkeypatch.setenv("INTACTKV_DATA", str(tmp_path))
    with pytest.raises(DataError, match="cais/mmlu"):
        load_dataset("cais/mmlu")


def test_two_mirrors_of_one_layout_are_two_data_sets(mirror, tmp_path, monkeypatch):
    """Their cards are equal; `datasets` alone would give the rows of whichever was read first."""
    import shutil

    first = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"][:]
    other = tmp_path / "other"
    shutil.copytree(mirror, other)
    monkeypatch.setenv("INTACTKV_DATA", str(other))
    file = other / "Salesforce/wikitext/wikitext-2-raw-v1/test.parquet"
    Dataset.from_list([{"text": "changed"}]).to_parquet(file)
    assert load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"][:] == ["changed"]
    Dataset.from_list([{"text": "changed again"}]).to_parquet(file)
    assert load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"][:] == ["changed again"]
    assert first == TEXT


def test_a_task_in_tokens_needs_a_tokenizer():
    with pytest.raises(DataError, match="metadata"):
        tokenizer_of({})


def _write_mmlu(root, subject, questions):
    for split in ("dev", "test"):
        (root / split).mkdir(parents=True, exist_ok=True)
        with (root / split / f"{subject}_{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(questions[split])


def test_mmlu_prompt_and_dropped_shots(saved_llama, tmp_path, monkeypatch):
    root = tmp_path / "csv"
    dev = [[f"Shot {i}?", "w", "x", "y", "z", "ABCD"[i % 4]] for i in range(5)]
    test = [["What, is 1+1?", "1", "2", "3", "4", "B"]] * 3
    _write_mmlu(root, "abstract_algebra", {"dev": dev, "test": test})
    monkeypatch.setenv("INTACTKV_DATA", str(root))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(saved_llama)})
    task = manager.load(["mmlu_5shot_abstract_algebra"])["tasks"]["mmlu_5shot_abstract_algebra"]
    doc = task.test_docs()[0]
    prompt = task.fewshot_context(doc, 5)
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about  abstract algebra.\n\nShot 0?\nA. w"
    )
    assert "Answer: A\n\nShot 1?" in prompt
    assert prompt.endswith("What, is 1+1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:")
    task._most = len(prompt) - 1
    shorter = task.fewshot_context(doc, 5)
    assert [i for i in range(5) if f"Shot {i}?" in shorter] == [0, 1, 2, 3], "the last shot goes, as released"
    task._most = 10
    assert "Shot" not in task.fewshot_context(doc, 5)
    task._most = 2048
    chat = task.fewshot_context(
        doc, 1, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=lambda m: str([x["role"] for x in m])
    )
    assert chat == "['user', 'assistant', 'user']"
    handed_on = {"metadata": ("t", 0, 1)} if ConfigurableTask is task_base("multiple_choice") else {"doc_id": 0}
    requests = task.construct_requests(doc, prompt, **handed_on)
    assert [request.args[1] for request in requests] == [" A", " B", " C", " D"]


def test_bos_that_a_chat_template_writes_is_counted_once(saved_llama, tmp_path, monkeypatch):
    """As lm_eval encodes such a prompt, also with a tokenizer that would put its own BOS in front."""
    rows = [[f"Q{i}", "a", "b", "c", "d", "A"] for i in range(2)]
    _write_mmlu(tmp_path / "csv", "anatomy", {"dev": rows, "test": rows})
    monkeypatch.setenv("INTACTKV_DATA", str(tmp_path / "csv"))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(saved_llama)})
    task = manager.load(["mmlu_5shot_anatomy"])["tasks"]["mmlu_5shot_anatomy"]
    assert task.eval_docs, "loaded, tokenizer and all"
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    task._tokenizer.backend_tokenizer.post_processor = processor

    def ask(most, template):
        task._most = most
        return task.fewshot_context(task.test_docs()[0], 2, apply_chat_template=True, chat_template=template)

    for template in (lambda messages: "<s>" + messages[0]["content"], lambda messages: messages[0]["content"]):
        whole = ask(2048, template)
        tokens = 1 + len(whole.removeprefix("<s>"))
        assert ask(tokens, template) == whole
        assert len(ask(tokens - 1, template)) < len(whole)


def test_mmlu_groups_are_weighted_by_questions(saved_llama, tmp_path, monkeypatch):
    root = tmp_path / "csv"
    stem = yaml.safe_load((TASKS / "mmlu/0shot/_mmlu_0shot_stem.yaml").read_text())["task"]
    for number, name in enumerate(stem):
        rows = [[f"Q{i}", "a", "b", "c", "d", "ABCD"[i % 4]] for i in range(1 + 3 * (number == 0))]
        _write_mmlu(root, name.removeprefix("mmlu_0shot_"), {"dev": rows, "test": rows})
    monkeypatch.setenv("INTACTKV_DATA", str(root))
    found = evaluate(["mmlu_0shot_stem"], saved_llama)["results"]
    right = sum(found[name]["acc,none"] * (4 if name == stem[0] else 1) for name in stem)
    assert found["mmlu_0shot_stem"]["acc,none"] == pytest.approx(right / (len(stem) + 3))


def test_a_damaged_csv_names_the_row(tmp_path, monkeypatch, saved_llama):
    root = tmp_path / "csv"
    rows = {"dev": [["q", "a", "b", "c", "d", "A"]], "test": [["q", "a", "b", "c", "d", "E"]]}
    _write_mmlu(root, "anatomy", rows)
    monkeypatch.setenv("INTACTKV_DATA", str(root))
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"pretrained": str(saved_llama)})
    with pytest.raises(DataError, match=r"anatomy_test\.csv, row 1"):
        len(manager.load(["mmlu_0shot_anatomy"])["tasks"]["mmlu_0shot_anatomy"].eval_docs)  # loaded here, or before


def test_law_13_every_task_is_indexed():
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    declared = [yaml.load(path.read_text(), _Tolerant) for path in TASKS.rglob("*.yaml")]
    names = {entry.get("group") or entry["task"] for entry in declared}
    assert names <= set(manager.all_tasks)
    assert len([name for name in names if name.startswith("mmlu_5shot_")]) == 57 + 4
    for entry in declared:
        members = entry["task"] if "group" in entry else []
        ours = {member for member in members if isinstance(member, str)}
        assert ours <= set(manager.all_tasks), entry["group"]


def test_generated_mmlu_files_are_current(tmp_path):
    import importlib.util
    import shutil

    shutil.copytree(TASKS / "mmlu", tmp_path / "mmlu", ignore=shutil.ignore_patterns("__pycache__", "*shot"))
    spec = importlib.util.spec_from_file_location("generate", tmp_path / "mmlu" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    made = {p.relative_to(tmp_path / "mmlu"): p.read_text() for p in (tmp_path / "mmlu").rglob("*shot/*.yaml")}
    shipped = {p.relative_to(TASKS / "mmlu"): p.read_text() for p in (TASKS / "mmlu").rglob("*shot/*.yaml")}
    assert made == shipped


class _Tolerant(yaml.SafeLoader):
    """Reads lm_eval's !function tags as text."""


_Tolerant.add_constructor("!function", lambda loader, node: node.value)
