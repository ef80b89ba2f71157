"""Texts of the perplexity tasks, joined as the papers join them; and their rolling counterparts."""

from typing import Any

from datasets import Dataset

from intactkv_eval.data.hub import load_dataset, mirror
from intactkv_eval.lm_tasks.perplexity import WindowTask, exp_mean, window_nll  # noqa: F401  named in the YAML files
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of

_C4_FILE = "en/c4-validation.00000-of-00008.json.gz"
_C4_DOCUMENTS, _C4_TOKENS = 1100, 256 * 2048


def wikitext2(**_: Any) -> str:
    """wikitext-2-raw-v1 test, lines joined by two newlines."""
    rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return "\n\n".join(rows["text"])


def c4(**_: Any) -> str:
    """The first 1100 documents of C4's first validation file, joined by a space."""
    root = mirror()
    if root and not (root / "allenai/c4" / _C4_FILE).is_file():
        rows = load_dataset("allenai/c4", "en", split="validation")
    else:
        rows = load_dataset("allenai/c4", data_files={"validation": _C4_FILE}, split="validation")
    return " ".join(rows[:_C4_DOCUMENTS]["text"])


def ptb(**_: Any) -> str:
    """penn_treebank test sentences, joined by a space."""
    options = {"split": "test", "revision": "refs/convert/parquet"}
    rows = load_dataset("ptb-text-only/ptb_text_only", "penn_treebank", **options)
    return " ".join(rows["sentence"])


def rolling(text: str) -> dict[str, Dataset]:
    """One document: lm_eval's own rolling perplexity is taken over the whole text."""
    return {"test": Dataset.from_list([{"page": text}])}


def wikitext2_rolling(**_: Any) -> dict[str, Dataset]:
    """The text of ppl_wikitext2."""
    return rolling(wikitext2())


def c4_rolling(**metadata: Any) -> dict[str, Dataset]:
    """The text of ppl_c4, cut where its 256 windows of 2048 tokens end."""
    tokenizer = tokenizer_of(metadata)
    return rolling(tokenizer.decode(tokenizer(c4()).input_ids[:_C4_TOKENS], skip_special_tokens=True))


def ptb_rolling(**_: Any) -> dict[str, Dataset]:
    """The text of ppl_ptb."""
    return rolling(ptb())
