"""Writes vicuna.json: the tokens that IntactKV's released code trains on, and which of them its loss looks at.

Run in an environment of its own with what the released repository (https://github.com/ruikangliu/IntactKV, commit
e9b841e9357c59ed800620373454110fc52fbfe4) pins, transformers 4.36.0, sentencepiece 0.2.0 and fschat 0.2.34:

    python tests/data/released/make_vicuna.py INTACTKV

No tokenizer of Vicuna's is needed: a SentencePiece model of Llama's settings (BPE, byte fallback, digits by themselves)
is trained on the invented conversations and read by Llama's slow tokenizer, which the released code uses. Beside the
tokens, the file holds the same tokenizer in the fast format that our tests load.
"""

import importlib
import json
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import sentencepiece
import torch
import transformers

COMMIT = "e9b841e9357c59ed800620373454110fc52fbfe4"
HERE = Path(__file__).parent
LONGEST, LEAST = 320, 50  # tokens of an example, and the counted tokens that it must have more of
WORDS = """
    the a curious assistant gives helpful detailed polite answers to questions chat between user and artificial
    intelligence how many apples cost bread river mountain window green seven walks slowly towards evening
"""


def prose(seed, count):
    draw, words = random.Random(seed), WORDS.split()
    return " ".join(draw.choice(words) for _ in range(count)) + "."


def conversations():
    """Invented, in ShareGPT's layout; each is there for something that a tokenization could do otherwise."""
    spoken = {
        "one turn": [("human", "How many apples?"), ("gpt", prose(0, 60))],
        "two turns, of 104 counted tokens and more": [
            ("human", "Ünïcode, 😀 and 1234?"), ("gpt", "Zwölf 🙂.\n\n  * " + prose(1, 40)),
            ("human", prose(2, 20)), ("gpt", "```\nx = 1\n```\n" + prose(3, 40)),
        ],
        "an answer to nothing at the start": [("gpt", prose(4, 20)), ("human", "And bread?"), ("gpt", prose(5, 70))],
        "a question without an answer at the end": [("human", "a"), ("gpt", prose(6, 80)), ("human", "And then?")],
        "spaces around messages": [("human", " two  spaces\n"), ("gpt", "  " + prose(7, 60) + " \n")],
        "an empty question": [("human", "cost"), ("gpt", prose(8, 60)), ("human", ""), ("gpt", prose(9, 10))],
        "an empty first question": [("human", ""), ("gpt", prose(10, 70))],
        "cut in an answer": [("human", "Tell me more"), ("gpt", prose(11, 320))],
        "cut in a later question": [("human", "x"), ("gpt", prose(12, 70)), ("human", prose(13, 320)), ("gpt", "yes")],
        "too few counted tokens": [("human", prose(14, 60)), ("gpt", "seven")],
    }  # fmt: skip
    return [
        {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}
        for name, turns in spoken.items()
    ]


def train_tokenizer(folder, rows):
    """Llama's slow tokenizer over a SentencePiece model of the conversations' words."""
    text = [line for row in rows for turn in row["conversations"] for line in turn["value"].splitlines()]
    text += ["A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, add_dummy_prefix=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return [
        transformers.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=legacy, model_max_length=4096)
        for legacy in (True, False)
    ]


def fast_of(folder):
    fast = transformers.LlamaTokenizerFast(str(folder / "tokenizer.model"))
    return json.loads(fast.backend_tokenizer.to_str())


def head_of(released, tokenizer):
    """The tokens of [P], as the released capture makes them; its model is asked for nothing else."""

    class Model:
        def eval(self):
            pass

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, input_ids):
            return SimpleNamespace(past_key_values=())

    return released.gen_vicuna_prompt_kv(Model(), tokenizer)[1][0].tolist()


def examples_of(released, rows, tokenizer, folder):
    """What the released data module keeps of the conversations, by their names."""
    (folder / "rows.json").write_text(json.dumps(rows))
    enough = sum(
        len(released.preprocess([row["conversations"]], tokenizer, LONGEST)["gpt_masks"]) > LEAST for row in rows
    )
    arguments = SimpleNamespace(dataset_path=folder / "rows.json", max_seq_len=LONGEST, max_train_samples=enough)
    module = released.make_sharegpt_data_module(arguments, tokenizer, LEAST)
    return {  # an empty message makes the released ids floats
        raw["id"]: {"tokens": item["input_ids"][0].long().tolist(), "counted": spans(item["gpt_masks"].tolist())}
        for raw, item in zip(module.raw_data, module.cached_data_dict, strict=True)
    }


def spans(places):
    """Runs of consecutive places as [first, behind the last]."""
    found = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1][1] += 1
        else:
            found.append([place, place + 1])
    return found


def main():
    (repository,) = sys.argv[1:]
    sys.path.insert(0, repository)
    released, capture = (importlib.import_module(name) for name in ("utils.sharegpt", "intactkv.utils"))
    rows = conversations()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slow, newer = train_tokenizer(folder, rows)
        found = examples_of(released, rows, slow, folder)
        assert found == examples_of(released, rows, newer, folder)  # of the two ways in which Llama's treats spaces
        made = {
            "made_by": f"utils/sharegpt.py and intactkv/utils.py of IntactKV at {COMMIT}",
            "transformers": transformers.__version__,
            "longest": LONGEST,
            "least_counted": LEAST,
            "head": head_of(capture, slow),
            "conversations": rows,
            "examples": dict(sorted(found.items())),
        }
        assert made["head"] == head_of(capture, newer)
        tokenizer = fast_of(folder)
    (HERE / "vicuna.json").write_text(json.dumps(made, ensure_ascii=False) + "\n", encoding="utf-8")
    (HERE / "llama_tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
