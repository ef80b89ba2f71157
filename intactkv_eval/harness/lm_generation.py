"""The generating half of IntactKVLM: lm_eval's requests and options, generated behind the pivot."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from intactkv_eval.compat.lm_eval_api import HFLM, Instance, normalize_gen_kwargs, stop_sequences_criteria
from intactkv_eval.compat.transformers_api import template_clock
from intactkv_eval.config import CellSpec
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.harness.chat_date import check_captured_head
from intactkv_eval.harness.framing import Framing
from intactkv_eval.harness.generation import generate
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.shared_start import SharedStart
from intactkv_eval.pivot.chat import ChatSettings
from intactkv_eval.pivot.tokens import opens_messages

logger = logging.getLogger(__name__)


class PivotedGeneration(HFLM):
    """`hf` whose generation stands behind a pivot. What it uses is made by the class that inherits it."""

    cell: CellSpec
    framing: Framing
    chat: ChatSettings  # of all chat prompts
    _is_head: bool  # whether the pivot is what the chat template's prompts begin with
    _longest: int | None
    _starts: SharedStart | None

    @property
    def pivoted_model(self) -> PivotedModel:
        """The model with the pivot in front."""
        raise NotImplementedError

    def _framing(self, token_ids: tuple[int, ...]) -> Framing:
        """Raises PivotError for the head of chat prompts that this run renders otherwise."""
        self.chat_template_args = dict(self.chat.arguments)
        pivot = self.pivoted_model.pivot
        head = None if pivot is None else pivot.head
        self._is_head = check_captured_head(self.cell.pivot, token_ids, head, self.tokenizer, self.chat)
        first = self.prefix_token_id
        longer = len(token_ids) > 1 and token_ids[0] == first
        opens = longer and opens_messages(self.tokenizer, first, self.chat)
        return Framing(token_ids, first, int(self.max_length), opens)

    def check_head(self, prompt: str, tokens: Sequence[int]) -> None:
        """Raise PivotError for a chat prompt that would stand behind the opening of another one.

        One whose message has run together with the head's last token gets a second head: warned of, and counted.
        """
        head = self.framing.token_ids
        if not self._is_head or tuple(tokens[: len(head)]) == head:
            return
        text = self.tokenizer.decode(head, clean_up_tokenization_spaces=False)
        if not prompt.startswith(text):
            raise PivotError(
                f"pivot={self.cell.pivot.source}: the pivot is the head of a chat prompt, {text!r}, and this prompt "
                f"begins otherwise: {prompt[:200]!r}. Leave out its system message (a system_instruction, a task's "
                "description), or write it into a template of your own, chat_template=FILE.jinja; or use pivot=bos"
            )
        if not self.framing.counts["two_heads"]:
            logger.warning(
                "a message runs together with the pivot's last token, so its prompt has a second head: %r; the results "
                "JSON counts them all under two_heads; use pivot=bos", prompt[: len(text) + 40],
            )  # fmt: skip
        self.framing.counts["two_heads"] += 1

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, as lm_eval's `hf` writes it, on the run's date.

        Raises PivotError where it lacks the head that is the pivot.
        """
        with template_clock(self.chat.moment):
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        self.check_head(text, self.tok_encode(text))
        return text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts generated behind the pivot."""
        lengths = (
            len(self.tok_encode(text)) + self._new_tokens(options) for text, options in (r.args for r in requests)
        )
        self._longest = max(lengths, default=None)
        new = max((self._new_tokens(request.args[1]) for request in requests), default=0)
        if new >= self.max_length:
            raise ConfigError(
                f"max_gen_toks={new} leaves no room for a prompt: {self.max_length} tokens fit behind the pivot"
            )
        texts: list[str] = super().generate_until(requests, disable_tqdm)
        return texts

    def _new_tokens(self, options: Mapping[str, Any]) -> int:
        return int(normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"])

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Texts -> left-padded bodies [B, T] and their mask: the pivot is taken off before anything is cut."""
        bodies = [self.framing.body(self.tok_encode(text)) for text in strings]
        if left_truncate_len:
            self.framing.counts["truncated"] += sum(len(body) > left_truncate_len for body in bodies)
            bodies = [body[-left_truncate_len:] for body in bodies]
        longest = max(len(body) for body in bodies)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(body)) + body for body in bodies], dtype=torch.long)
        mask = torch.tensor([[0] * (longest - len(body)) + [1] * len(body) for body in bodies], dtype=torch.long)
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        temperature = options.get("temperature", 0.0)
        if options.get("do_sample") is None:
            options["do_sample"] = temperature > 0
        if not options["do_sample"]:
            options.pop("temperature", None)
        mask = options.pop("attention_mask")

        def stopping(columns: int, rows: int) -> StoppingCriteriaList:
            criteria: StoppingCriteriaList = stop_sequences_criteria(self.tokenizer, stop, columns, rows)
            return criteria

        return generate(
            self.pivoted_model,
            context,
            mask,
            max_length - context.shape[1],
            stopping,
            self._starts,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
