"""Law 16, of chat prompts: Vicuna's and Llama 2's are FastChat's, in text and in tokens, with `legacy` both ways.

The fixture was made by FastChat's own conversations and the slow tokenizer that it loads (tests/fixtures/released/
make_fastchat.py). Of the invented questions every prompt is asked here; MT-Bench's own 80 are not in the repository.
"""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from helpers import spm

from intactkv_eval.chat.bos_text import encoded_prompt
from intactkv_eval.chat.messages import Message
from intactkv_eval.pivot.tokens import use_chat_template
from intactkv_eval.training.examples import rendered

RELEASED = Path(__file__).parents[1] / "fixtures" / "released"
FASTCHAT = json.loads((RELEASED / "fastchat.json").read_text(encoding="utf-8"))
MODEL = (RELEASED / "llama.model").read_bytes()


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@pytest.fixture(scope="module", params=["true", "false"])
def llama(request, tmp_path_factory):
    """`legacy`, and Llama's tokenizer with it."""
    folder = tmp_path_factory.mktemp("llama")
    return request.param, spm.tokenizer(folder, request.param == "true", MODEL, model_max_length=4096)


def asked(tokenizer, template, turns, answer, system=None):
    """Our prompt of each turn, behind the same answer to each before it."""
    use_chat_template(tokenizer, template)
    said = [] if system is None else [Message("system", system)]
    for turn in turns:
        said.append(Message("user", turn))
        yield rendered(said, tokenizer, invite=True)
        said.append(Message("assistant", answer))


def equal_rows(part, questions, llama):
    """How many prompts, how many rows of tokens are FastChat's, and of how many."""
    legacy, tokenizer = llama
    counts = Counter()
    for name, wanted in FASTCHAT[part]["rows"].items():
        template, kind = name.split()
        for number, turns in enumerate(questions):
            answer = FASTCHAT["answers"][number][kind]
            for turn, prompt in enumerate(asked(tokenizer, template, turns, answer)):
                counts["rows"] += 1
                counts["prompts"] += digest(prompt.removeprefix("<s>")) == wanted["prompts"][number][turn]
                tokens = digest(encoded_prompt(tokenizer, prompt))
                counts["tokens"] += tokens == wanted["tokens"][legacy][number][turn]
    return counts


def test_prompts_and_tokens_of_invented_questions(llama):
    """Two templates, three kinds of answers, an empty one among them, eleven turns."""
    counts = equal_rows("invented", FASTCHAT["invented"]["questions"], llama)
    assert counts == {"rows": 66, "prompts": 66, "tokens": 66}


@pytest.mark.shared
def test_prompts_and_tokens_of_mt_bench(llama, shared_hub):
    """80 questions of two turns: 960 rows for each `legacy`, 1,920 in all."""
    file = shared_hub.parent / "mt_bench" / "question.jsonl"
    questions = [json.loads(line)["turns"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert digest(questions) == FASTCHAT["mt_bench"]["questions"]
    assert equal_rows("mt_bench", questions, llama) == {"rows": 960, "prompts": 960, "tokens": 960}


def test_behind_an_empty_answer_stands_nothing(llama):
    """FastChat's conversations write the assistant's word alone, and the next question right behind it."""
    _, tokenizer = llama
    first, second = asked(tokenizer, "vicuna_v1.1", ["Hi", "More"], "")
    assert second == f"{first}USER: More ASSISTANT:"
    assert list(asked(tokenizer, "llama-2", ["Hi", "More"], "")) == [
        "<s>[INST] Hi [/INST]", "<s>[INST] Hi [/INST][INST] More [/INST]",
    ]  # fmt: skip


@pytest.mark.parametrize("named", FASTCHAT["systems"])
def test_prompts_behind_a_system_message(llama, named):
    template, _, system = named.partition(" ")
    prompts = asked(llama[1], template, FASTCHAT["invented"]["questions"][0], "seven", system)
    assert [digest(prompt.removeprefix("<s>")) for prompt in prompts] == FASTCHAT["systems"][named]


def test_the_slow_tokenizer_of_our_other_tests_is_fastchats(llama):
    """tests/helpers/spm.py says in a few lines what it makes of a text; here beside what it did make."""
    legacy, tokenizer = llama
    released = spm.Released(legacy == "true", MODEL)
    for name, wanted in FASTCHAT["invented"]["rows"].items():
        template, kind = name.split()
        for number, turns in enumerate(FASTCHAT["invented"]["questions"]):
            prompts = asked(tokenizer, template, turns, FASTCHAT["answers"][number][kind])
            tokens = [digest(released(prompt.removeprefix("<s>"))) for prompt in prompts]
            assert tokens == wanted["tokens"][legacy][number]
