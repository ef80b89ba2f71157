"""Writes fastchat.json: the prompts that FastChat writes for MT-Bench, and the tokens that its tokenizer makes of them.

Run in an environment of its own with transformers 4.36.0 and sentencepiece 0.2.0, beside a checkout of FastChat
(https://github.com/lm-sys/FastChat, commit 0e6d3e4beaab66f4d3f93db72541a4abab8af28d) and MT-Bench's 80 questions:

    python tests/data/released/make_fastchat.py FASTCHAT mt_bench/question.jsonl

Prompts are those of FastChat's own conversations `vicuna_v1.1` and `llama-2`, made turn by turn as its gen_model_answer
does. Tokens are those of Llama's slow tokenizer, which FastChat loads, with `legacy` both ways, over a SentencePiece
model of Llama's settings that is trained here on invented text and kept beside the file. Of texts and tokens the file
holds digests, so no question of MT-Bench and no sentence of FastChat is in it.
"""

import hashlib
import importlib
import io
import json
import random
import sys
from pathlib import Path

import sentencepiece
import transformers

COMMIT = "0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
HERE = Path(__file__).parent
TEMPLATES = ("vicuna_v1.1", "llama-2")
WORDS = """
    the a curious assistant gives helpful detailed polite answers to questions chat between user and artificial
    intelligence how many apples cost bread river mountain window green seven walks slowly towards evening
"""
INVENTED = [
    ["How many apples?", "And bread?"],
    ["Ünïcode, 😀 and 1234?", "Zwölf 🙂.\n\n  * a list"],
    ["  two spaces in front", "and behind  "],
    ["A line\nand another\n", "\n\nlines in front"],
    ["[INST] is a word? USER: ASSISTANT:", "[/INST]"],
    ["one turn alone"],
]


def prose(seed, count):
    draw, words = random.Random(seed), WORDS.split()
    return " ".join(draw.choice(words) for _ in range(count)).capitalize() + "."


def answers(number):
    """Answers to a first question: in words, none at all, and one that a tokenization could do otherwise."""
    return {"words": prose(number, 40), "empty": "", "odd": f"«{prose(number, 5)}»\n\n```\nx = 1 🙂\n```"}


def digest(value):
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def rows_of(conversation, template, turns, answer, system=None):
    """FastChat's prompt of each turn."""
    conv = conversation.get_conv_template(template)
    if system is not None:
        conv.set_system_message(system)
    prompts = []
    for turn in turns:
        conv.append_message(conv.roles[0], turn)
        conv.append_message(conv.roles[1], None)
        prompts.append(conv.get_prompt())
        conv.update_last_message(answer)
    return prompts


def rows(conversation, tokenizers, questions):
    """For each template and kind of answer, question by question: digests of prompts, and of tokens by `legacy`."""
    made = {}
    for template in TEMPLATES:
        for kind in answers(0):
            texts, tokens = [], {legacy: [] for legacy in tokenizers}
            for number, turns in enumerate(questions):
                prompts = rows_of(conversation, template, turns, answers(number)[kind])
                texts.append([digest(prompt) for prompt in prompts])
                for legacy, tokenizer in tokenizers.items():
                    tokens[legacy].append([digest(tokenizer([prompt]).input_ids[0]) for prompt in prompts])
            made[f"{template} {kind}"] = {"prompts": texts, "tokens": tokens}
    return made


def train(path):
    text = [prose(seed, 30) for seed in range(200)]
    text += ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: [INST]"] * 20
    written = io.BytesIO()  # a path would be written into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=written, vocab_size=420, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    path.write_bytes(written.getvalue())


def main():
    repository, questions = sys.argv[1:]
    sys.path.insert(0, repository)
    conversation = importlib.import_module("fastchat.conversation")
    listed = [json.loads(line)["turns"] for line in Path(questions).read_text(encoding="utf-8").splitlines()]
    model = HERE / "llama.model"
    train(model)
    tokenizers = {
        legacy: transformers.LlamaTokenizer(str(model), legacy=legacy == "true", model_max_length=4096)
        for legacy in ("true", "false")
    }
    made = {
        "made_by": f"fastchat/conversation.py at {COMMIT}",
        "transformers": transformers.__version__,
        "answers": [answers(number) for number in range(len(listed))],
        "systems": {
            f"{template} {system}": [
                digest(one) for one in rows_of(conversation, template, INVENTED[0], "seven", system)
            ]
            for template in TEMPLATES
            for system in ("", "Be brief.")
        },
        "invented": {"questions": INVENTED, "rows": rows(conversation, tokenizers, INVENTED)},
        "mt_bench": {"questions": digest(listed), "rows": rows(conversation, tokenizers, listed)},
    }
    (HERE / "fastchat.json").write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
