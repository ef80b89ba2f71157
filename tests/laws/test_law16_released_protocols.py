"""Law 16, of protocols: MMLU's prompts and Vicuna's training targets are those that IntactKV's released code makes.

The fixtures were made by that code (tests/fixtures/released/make_mmlu.py and make_vicuna.py).
"""

import csv
import hashlib
import json
from pathlib import Path

import pytest
import yaml
from helpers.tiny import BOS, byte_tokenizer
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from intactkv_eval.chat.conversations import load_conversations
from intactkv_eval.lm.pivot_framing import PivotFraming
from intactkv_eval.pivot.tokens import prompt_head, use_chat_template
from intactkv_eval.storage.files import shipped_folder
from intactkv_eval.training.examples import examples_of

RELEASED = Path(__file__).parents[1] / "fixtures" / "released"
MMLU = json.loads((RELEASED / "mmlu.json").read_text(encoding="utf-8"))
VICUNA = json.loads((RELEASED / "vicuna.json").read_text(encoding="utf-8"))
TASKS = shipped_folder("tasks")


def digest(prompts):
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def prompts_of(subject, shots, tokenizer):
    """Of every question, as lm_eval gets them from the task."""
    name = f"mmlu_{shots}shot_{subject}"
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"tokenizer": tokenizer})
    task = manager.load([name])["tasks"][name]
    return [task.fewshot_context(doc, shots) for doc in task.test_docs()]


def shots_in(prompt):
    return prompt.count("\nAnswer: ")


def bytes_behind_bos():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.mark.parametrize(("name", "make"), [("bytes", byte_tokenizer), ("bytes behind BOS", bytes_behind_bos)])
def test_mmlu_keeps_the_first_shots_as_released(tmp_path, monkeypatch, name, make):
    """On invented questions that keep 5 to 0 shots, two of which are at the limit and one token above it."""
    made, wanted = MMLU["invented"], MMLU["invented"]["tokenizers"][name]
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        with (tmp_path / split / f"{made['subject']}_{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(made[split])
    monkeypatch.setenv("INTACTKV_DATA", str(tmp_path))
    prompts = prompts_of(made["subject"], 5, make())
    found = "".join(str(shots_in(prompt)) for prompt in prompts)
    assert set(found) == set("012345")
    assert found[: len(wanted["kept"])] == wanted["kept"]
    assert [digest([prompt]) for prompt in prompts[: len(wanted["sha256"])]] == wanted["sha256"]
    # What does not fit without any shot is asked whole; the released loop does not end on it.
    assert all(shots_in(prompt) == 0 for prompt in prompts[len(wanted["kept"]) :])


def test_mmlu_categories_are_the_released_ones():
    names = {"STEM": "stem", "humanities": "humanities", "social sciences": "social_sciences"}
    for shots in (0, 5):
        found = {}
        for category in ("stem", "humanities", "social_sciences", "other"):
            file = TASKS / "mmlu" / f"{shots}shot" / f"_mmlu_{shots}shot_{category}.yaml"
            listed = yaml.safe_load(file.read_text())["task"]
            found |= {task.removeprefix(f"mmlu_{shots}shot_"): category for task in listed}
        assert found == {subject: names.get(name, "other") for subject, name in MMLU["categories"].items()}


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("subject", MMLU["real"])
def test_mmlu_prompts_are_the_released_ones_on_real_subjects(smollm2, shared_hub, monkeypatch, subject):
    monkeypatch.setenv("INTACTKV_DATA", str(shared_hub))
    wanted = MMLU["real"][subject]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for shots, key in ((5, "sha256"), (0, "sha256_0shot")):
        prompts = prompts_of(subject, shots, tokenizer)
        assert len(prompts) == wanted["questions"]
        # pandas reads the word None as a number that is missing: the released prompts say "nan" there.
        assert all("None" in prompts[i] for i in wanted["read_otherwise"])
        assert digest([prompt for i, prompt in enumerate(prompts) if i not in wanted["read_otherwise"]]) == wanted[key]
        if shots:
            assert "".join(str(shots_in(prompt)) for prompt in prompts) == wanted["kept"]


def llama_tokenizer(legacy):
    """The fixture's, as transformers builds Llama's fast tokenizer with `legacy: true` and with `legacy: false`."""
    core = Tokenizer.from_file(str(RELEASED / "llama_tokenizer.json"))
    if not legacy:
        core.normalizer = None
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=4096
    )
    use_chat_template(made, "vicuna_v1.1")
    return made


def load(folder, name):
    """One conversation of the fixture, as a ShareGPT file is read."""
    file = folder / "one.json"
    file.write_text(json.dumps([row for row in VICUNA["conversations"] if row["id"] == name]))
    return load_conversations(str(file))


def counted(example, longest):
    return [any(first <= place < last for first, last in example["counted"]) for place in range(longest)]


# transformers' `legacy: false` puts no space in front of a message that begins with one; sentencepiece does.
_SPACES = "spaces around messages"
CASES = [(name, legacy) for name in VICUNA["examples"] for legacy in (True, False) if legacy or name != _SPACES]


@pytest.mark.parametrize("legacy", [True, False])
def test_the_head_of_vicunas_prompts_is_the_released_one(legacy):
    assert list(prompt_head(llama_tokenizer(legacy))) == VICUNA["head"]


@pytest.mark.parametrize("front", ["bos", "prompt"])
@pytest.mark.parametrize(("name", "legacy"), CASES)
def test_vicunas_tokens_and_what_counts_of_them_are_the_released_ones(tmp_path, name, legacy, front):
    """Of both of Llama's tokenizers, behind BOS and behind the head of the prompts."""
    wanted, tokenizer = VICUNA["examples"][name], llama_tokenizer(legacy)
    head = VICUNA["head"] if front == "prompt" else VICUNA["head"][:1]
    framing = PivotFraming(tuple(head), tokenizer.bos_token_id, 4096)
    (found,) = examples_of(load(tmp_path, name), tokenizer, framing.body, VICUNA["longest"], VICUNA["least_counted"])
    tokens, counts = wanted["tokens"], counted(wanted, len(wanted["tokens"]))
    if name == "a question without an answer at the end":  # cut off as the file is read: no counted token is behind it
        tokens = tokens[: wanted["counted"][-1][1]]
    if name == "an empty first question" and front == "prompt":  # it has no `USER:`, with which the head ends
        head = head[:1]
    assert framing.counts == ({"stripped": 1} if len(head) > 1 or front == "bos" else {"bos_replaced": 1})
    assert found.body.tolist() == tokens[len(head) :]
    assert found.counted.tolist() == counts[len(head) : len(tokens)]
    assert not any(counts[len(tokens) :])
    assert 2 not in tokens  # no </s>


def test_conversations_with_too_few_counted_tokens_are_left_out_as_released(tmp_path):
    file = tmp_path / "all.json"
    file.write_text(json.dumps(VICUNA["conversations"]))
    found = examples_of(
        load_conversations(str(file)), llama_tokenizer(True), list, VICUNA["longest"], VICUNA["least_counted"]
    )
    sizes = sorted(sum(last - first for first, last in one["counted"]) for one in VICUNA["examples"].values())
    assert sorted(int(one.counted.sum()) for one in found) == sizes
    assert len(found) == len(VICUNA["conversations"]) - 1
