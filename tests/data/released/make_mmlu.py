"""Writes mmlu.json: which prompts IntactKV's released MMLU evaluation asks, and how many shots each of them keeps.

Run with the released repository (https://github.com/ruikangliu/IntactKV, commit e9b841e9357c59ed800620373454110fc52fbfe4),
a folder of MMLU (the hub's cais/mmlu, or hendrycks' CSV folders dev/ and test/) and the folder of a tokenizer:

    python tests/data/released/make_mmlu.py INTACTKV MMLU TOKENIZER

The released evaluation itself is run, beside a model that answers nothing and a tokenizer that keeps what it is given.
The invented questions are stored in the file; of the real ones it holds numbers and digests only.
`kept` has one digit a question: how many of its five shots stayed.
"""

import csv
import hashlib
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pandas
import torch
from datasets import load_dataset
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
from tiny import BOS, byte_tokenizer

COMMIT = "e9b841e9357c59ed800620373454110fc52fbfe4"
LONGEST = 2048
SUBJECT = "high_school_us_history"  # of the invented questions, whose text has nothing of that subject's


class Recorder:
    """A tokenizer that keeps the texts it is asked for, and a model that answers every prompt with zeros.

    asked: the texts since the last answer. prompts, kept: of each answer, its prompt and how many shots are in it.
    """

    device = "cpu"

    def __init__(self, tokenizer, shots):
        self.tokenizer, self.shots = tokenizer, shots
        self.asked, self.prompts, self.kept = [], [], []

    def tokenize(self, text, **options):
        if text not in {"A", "B", "C", "D"}:
            self.asked.append(text)
        return self.tokenizer(text, **options)

    def __call__(self, input_ids):
        self.prompts.append(self.asked[-1])
        self.kept.append(self.shots + 1 - len(self.asked))
        self.asked.clear()
        return SimpleNamespace(logits=torch.zeros(1, 1, len(self.tokenizer)))


def digest(prompts):
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def ask(released, folder, subject, tokenizer, shots):
    """The prompts of a subject, how many shots each keeps, and the questions that pandas reads otherwise than csv."""
    dev, test = (folder / split / f"{subject}_{split}.csv" for split in ("dev", "test"))
    frames = [pandas.read_csv(dev, header=None)[:shots], pandas.read_csv(test, header=None)]
    recorder = Recorder(tokenizer, shots)
    released.eval(shots, subject, recorder, recorder.tokenize, *frames)
    rows = read_csv(test)
    changed = [i for i, row in enumerate(rows) if row != [str(frames[1].iloc[i, j]) for j in range(len(row))]]
    assert read_csv(dev)[:shots] == [[str(cell) for cell in row] for row in frames[0].to_numpy()[:shots]]
    return recorder.prompts, recorder.kept, changed


def invented():
    """Five shots of about 300 bytes, and questions of many lengths, some of which fill the limit to the last byte."""
    dev = [
        [f'Shot {i}, he said "{i}":  {"lorem ipsum " * (20 + i)}', "w ", " x", "1.50 m", "é, ü", "ABCDA"[i]]
        for i in range(5)
    ]
    sizes = (10, 200, 300, 320, 330, 340, 700, 1000, 1100, 1300, 1500, 1700, 1800, 1900)
    test = [[f"Question\nof {n}: {'dolor ' * (n // 6)}", "one", "two", "third", "four ", "ABCD"[n % 4]] for n in sizes]
    for shots, more in ((3, 0), (3, 1), (0, 0)):
        text = "The following are multiple choice questions (with answers) about  high school us history.\n\n"
        text += "".join(f"{row[0]}\nA. w \nB.  x\nC. 1.50 m\nD. é, ü\nAnswer: X\n\n" for row in dev[:shots])
        text += "\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
        test.append(["x" * (LONGEST + more - len(text.encode())), "1", "2", "3", "4", "B"])
    return {"dev": dev, "test": test}


def with_bos():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def of_invented(released):
    rows = invented()
    found = {"subject": SUBJECT, **rows, "tokenizers": {}}
    for name, tokenizer in (("bytes", byte_tokenizer()), ("bytes behind BOS", with_bos())):
        questions = rows["test"] if name == "bytes" else rows["test"][:-1]  # the last is too long even without shots
        with tempfile.TemporaryDirectory() as folder:
            write_csv(Path(folder, "dev", f"{SUBJECT}_dev.csv"), rows["dev"])
            write_csv(Path(folder, "test", f"{SUBJECT}_test.csv"), questions)
            prompts, kept, changed = ask(released, Path(folder), SUBJECT, tokenizer, 5)
        assert not changed
        found["tokenizers"][name] = {
            "kept": "".join(map(str, kept)),
            "sha256": [digest([prompt]) for prompt in prompts],
        }
    return found


def of_real(released, folder, tokenizer):
    """Each subject with 5 and 0 shots; questions that pandas reads otherwise are named and not digested."""
    found = {}
    with tempfile.TemporaryDirectory() as made:
        if not (folder / "test").is_dir():
            folder = as_csv(folder, Path(made))
        for subject in sorted(path.name.removesuffix("_test.csv") for path in (folder / "test").glob("*_test.csv")):
            prompts, kept, changed = ask(released, folder, subject, tokenizer, 5)
            without, _, _ = ask(released, folder, subject, tokenizer, 0)
            found[subject] = {
                "questions": len(prompts),
                "read_otherwise": changed,
                "kept": "".join(map(str, kept)),
                "sha256": digest([prompt for i, prompt in enumerate(prompts) if i not in changed]),
                "sha256_0shot": digest([prompt for i, prompt in enumerate(without) if i not in changed]),
            }
    return found


def as_csv(hub, made):
    """The subjects of the hub's layout as hendrycks' CSV folders."""
    for subject in sorted(path.name for path in hub.iterdir() if path.is_dir()):
        for split in ("dev", "test"):
            rows = load_dataset(str(hub), subject, split=split)
            lines = [[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in rows]
            write_csv(made / split / f"{subject}_{split}.csv", lines)
    return made


def main():
    repository, mmlu, tokenizer = map(Path, sys.argv[1:])
    sys.path.insert(0, str(repository))
    released = importlib.import_module("eval_utils.mmlu")
    category_of = {sub: name for name, listed in released.categories.items() for sub in listed}
    made = {
        "made_by": f"eval_utils/mmlu.py of IntactKV at {COMMIT}",
        "pandas": pandas.__version__,
        "categories": {subject: category_of[sub] for subject, (sub,) in released.subcategories.items()},
        "invented": of_invented(released),
        "tokenizer": tokenizer.name,
        "real": of_real(released, mmlu, AutoTokenizer.from_pretrained(tokenizer)),
    }
    (HERE / "mmlu.json").write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
