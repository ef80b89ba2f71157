"""The demo's data, which lies beside this file, and how it becomes tasks."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from intactkv_eval.lm_tasks.perplexity import WindowTask, exp_mean, window_nll  # noqa: F401  named in the YAML files
from intactkv_eval.lm_tasks.python_task import PythonTask  # noqa: F401  named in the YAML files
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of
from intactkv_eval.storage.files import read_jsonl

_DATA = Path(__file__).parent / "data"


def prose(**_: Any) -> str:
    """All passages, joined by two newlines."""
    return "\n\n".join(row["text"] for row in read_jsonl(_DATA / "prose.jsonl"))


def questions(**_: Any) -> dict[str, Dataset]:
    """The multiple-choice questions."""
    return {"test": Dataset.from_list(read_jsonl(_DATA / "questions.jsonl"))}


def dialogues(**metadata: Any) -> dict[str, Dataset]:
    """Two documents a dialogue: its prompt by the tokenizer's chat template up to each answer, and that answer."""
    tokenizer = tokenizer_of(metadata)
    rows = []
    for dialogue in read_jsonl(_DATA / "dialogues.jsonl"):
        messages: list[dict[str, str]] = []
        for turn, (asked, answer) in enumerate(zip(dialogue["turns"], dialogue["reference"], strict=True), start=1):
            messages.append({"role": "user", "content": asked})
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            row = {"id": dialogue["question_id"], "turn": turn, "prompt": prompt, "answer": answer}
            rows.append({**row, "tokens": len(tokenizer(answer, add_special_tokens=False).input_ids)})
            messages.append({"role": "assistant", "content": answer})
    return {"test": Dataset.from_list(rows)}


def answer_nll(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """process_results: mean nats a token of the written answer."""
    return {"nll": -results[0][0] / doc["tokens"]}
