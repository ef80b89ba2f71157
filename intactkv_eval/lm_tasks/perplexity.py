"""Perplexity by the papers' protocol, as a task of lm_eval: protocol `bos-window-N`.

The token stream of a text is cut into windows of N tokens that do not overlap; the tail is dropped. The first token of
every window is replaced by the pivot (BOS), and the prediction made at it is not counted:

    window w_0 .. w_{N-1}:  nll = mean over j = 2..N-1 of -log p(w_j | pivot, w_1 .. w_{j-1})
    perplexity = exp(mean over windows of nll)

Source: the released code of IntactKV; GPTQ's protocol is the same without the replacement.
"""

import logging
from collections.abc import Mapping, Sequence
from math import exp
from typing import Any

from datasets import Dataset

from intactkv_eval.compat.lm_eval_api import make_request
from intactkv_eval.data.hub import origin
from intactkv_eval.errors import DataError
from intactkv_eval.lm.token_text import TokenText
from intactkv_eval.lm_tasks.python_task import PythonTask
from intactkv_eval.lm_tasks.tokenizer import tokenizer_of

logger = logging.getLogger(__name__)
DEFAULT_WINDOW = 2048


class WindowTask(PythonTask):
    """A perplexity task whose documents are windows of tokens.

    The YAML names `custom_dataset`, a function that returns the text, and may set in its metadata `ppl_window` (N) and
    `max_windows`. Both can be set at run time: --metadata ppl_window=512.
    """

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Tokenize the text with the model's tokenizer and cut it into windows. Raises DataError where none is full."""
        metadata = self.config.metadata
        size = int(metadata.get("ppl_window") or DEFAULT_WINDOW)
        if size < 3:
            raise DataError(f"ppl_window={size}: a window needs at least 3 tokens")
        tokenizer = tokenizer_of(metadata)
        text = self.config.custom_dataset(**(dataset_kwargs or {}))
        self._windows = cut_windows(tokenizer(text).input_ids, size, metadata.get("max_windows"))
        self._tokenizer, self._warned = tokenizer, False
        metadata["protocol"], metadata["data"] = f"{_front(metadata, tokenizer)}-window-{size}", origin()
        self.dataset = {"test": Dataset.from_list([{"window": i, "tokens": size} for i in range(len(self._windows))])}

    def doc_to_text(self, doc: dict[str, Any], doc_to_text: Any = None) -> TokenText:
        """w_0, which the pivot replaces, and w_1."""
        return self._text(self._windows[doc["window"]][:2])

    def doc_to_target(self, doc: dict[str, Any], doc_to_target: Any = None) -> TokenText:
        """w_2 .. w_{N-1}, the tokens that are scored."""
        return self._text(self._windows[doc["window"]][2:])

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Any:
        """One log-likelihood a window. A chat template or few-shot examples have no place in this protocol."""
        arguments = (self.doc_to_text(doc), self.doc_to_target(doc))
        return make_request("loglikelihood", arguments, 0, doc, self.config.task, kwargs)

    def fewshot_context(self, doc: dict[str, Any], *args: Any, **kwargs: Any) -> str:
        """The context alone."""
        if kwargs.get("apply_chat_template") and not self._warned:
            logger.warning("%s: a chat template has no place in this protocol and is not applied", self.config.task)
            self._warned = True
        return self.doc_to_text(doc)

    def _text(self, ids: Sequence[int]) -> TokenText:
        return TokenText(self._tokenizer.decode(ids), ids)


def _front(metadata: Mapping[str, Any], tokenizer: Any) -> str:
    """What replaces a window's first token: without BOS and without a pivot nothing does, and it stays."""
    if tokenizer.bos_token_id is not None:
        return "bos"
    return "plain" if str(metadata.get("pivot")).lower() in {"none", "bos"} else "pivot"


def cut_windows(tokens: Sequence[int], size: int, most: int | None = None) -> list[Sequence[int]]:
    """Whole windows of `size` tokens, at most `most` of them. Raises DataError where the text is shorter than one."""
    count = len(tokens) // size
    if not count:
        raise DataError(f"the text has {len(tokens)} tokens, less than a window of {size}: --metadata ppl_window=N")
    count = min(count, int(most)) if most else count
    return [tokens[i * size : (i + 1) * size] for i in range(count)]


def window_nll(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """process_results: a window's mean nats a token, under both names it is averaged by."""
    log_likelihood, _ = results[0]
    nll = -log_likelihood / (doc["tokens"] - 2)
    return {"nll": nll, "perplexity": nll}


def exp_mean(values: Sequence[float]) -> float:
    """Aggregation: exp of the mean of the windows' nll."""
    return exp(sum(values) / len(values))
