"""MMLU with the prompts of hendrycks/test, as the IntactKV tables were made.

    The following are multiple choice questions (with answers) about  SUBJECT.   (two spaces, as released)

    question / A. .. D. / "Answer: X"  for each shot, then the question up to "Answer:"

The last shots are dropped until the prompt fits `max_prompt_tokens` (2048) of the model's own tokens, so the first ones
stay, as in IntactKV's released evaluation. Tokens are counted as the tokenizer makes them, with the BOS that it adds
itself. A question that does not fit even without shots is asked whole: the model cuts its beginning, and the results
count it as `truncated` (the released loop does not end on such a question).
"""

import csv
from pathlib import Path
from typing import Any

from datasets import Dataset

from intactkv_eval.chat.bos_text import encoded_prompt
from intactkv_eval.data.hub import load_dataset, mirror
from intactkv_eval.errors import DataError
from intactkv_eval.lm_tasks.python_task import PythonTask
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of

LETTERS = "ABCD"


def load(subject: str, **_: Any) -> dict[str, Any]:
    """dev and test of a subject: cais/mmlu, or hendrycks' CSV folders dev/ and test/ in the mirror."""
    root = mirror()
    if root and (root / "test" / f"{subject}_test.csv").is_file():
        files = {split: root / split / f"{subject}_{split}.csv" for split in ("dev", "test")}
        return {split: Dataset.from_list(_read_csv(file)) for split, file in files.items()}
    return {split: load_dataset("cais/mmlu", subject, split=split) for split in ("dev", "test")}


def _read_csv(path: Path) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 6 or row[5] not in LETTERS:
                raise DataError(f"{path}, row {number}: expected question, four choices and a letter of ABCD")
            rows.append({"question": row[0], "choices": row[1:5], "answer": LETTERS.index(row[5])})
    return rows


def question(doc: dict[str, Any]) -> str:
    """A question and its choices, up to "Answer:"."""
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, doc["choices"], strict=True))
    return f"{doc['question']}{choices}\nAnswer:"


class MMLU(PythonTask):
    """One subject. Its prompt is built here, because how many shots it has depends on the tokenizer."""

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Load the subject and the model's tokenizer."""
        self._subject = dataset_kwargs["subject"]
        self._tokenizer = tokenizer_of(self.config.metadata)
        self._most = int(self.config.metadata["max_prompt_tokens"])
        self.dataset = load(self._subject)

    def fewshot_context(
        self,
        doc: dict[str, Any],
        num_fewshot: int,
        system_instruction: str | None = None,
        apply_chat_template: bool = False,
        fewshot_as_multiturn: bool = False,
        chat_template: Any = None,
        gen_prefix: str | None = None,
    ) -> str:
        """The prompt with the most shots that fits; with a chat template the same text as messages."""
        examples = self.dataset["dev"].select(range(num_fewshot))
        shots = [(question(row), f" {LETTERS[row['answer']]}") for row in examples]
        for count in range(len(shots), -1, -1):
            kept = shots[:count]
            if apply_chat_template:
                prompt = chat_template(self._messages(doc, kept, system_instruction, fewshot_as_multiturn))
            else:
                lead = f"{system_instruction}\n\n" if system_instruction else ""
                prompt = lead + self._header() + "".join(f"{q}{a}\n\n" for q, a in kept) + question(doc)
            if self._length(prompt) <= self._most:
                break
        return prompt

    def _length(self, prompt: str) -> int:
        """Tokens of a prompt as it will be asked: a chat template that wrote BOS gets no second one."""
        return len(encoded_prompt(self._tokenizer, prompt))

    def _header(self) -> str:
        subject = "".join(f" {word}" for word in self._subject.split("_"))
        return f"The following are multiple choice questions (with answers) about {subject}.\n\n"

    def _messages(
        self, doc: dict[str, Any], shots: list[tuple[str, str]], system: str | None, multiturn: bool
    ) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": system}] if system else []
        if not multiturn:
            text = self._header() + "".join(f"{q}{a}\n\n" for q, a in shots) + question(doc)
            return [*messages, {"role": "user", "content": text}]
        turns = [*((q, a) for q, a in shots), (question(doc), "")]
        for number, (asked, answer) in enumerate(turns):
            messages.append({"role": "user", "content": (self._header() if not number else "") + asked})
            if answer:
                messages.append({"role": "assistant", "content": answer.strip()})
        return messages
