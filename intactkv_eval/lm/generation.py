"""The generating half of IntactKVLM: lm_eval's requests and options, generated behind the pivot."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.assemble.chat_date import check_captured_head
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.chat.bos_text import bos_changes_tokens
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.compat.lm_eval_api import HFLM, Instance, normalize_gen_kwargs
from intactkv_eval.compat.transformers_api import template_clock
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.inference.generation.generate import generate
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.generation.settings import own_lengths, say_length, served
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.lm.generation_options import check_options, for_generate
from intactkv_eval.lm.pivot_framing import PivotFraming
from intactkv_eval.lm.row_stops import filling_token, row_stops
from intactkv_eval.pivot.tokens import opens_messages

logger = logging.getLogger(__name__)

_BOS_IS_ADDED = "{# BOS is added by the tokenizer #}"


class PivotedGeneration(HFLM):
    """`hf` whose generation stands behind a pivot. What it uses is made by the class that inherits it."""

    cell: CellSpec
    framing: PivotFraming
    chat: ChatSettings  # of all chat prompts
    _is_head: bool  # whether the pivot is what the chat template's prompts begin with
    _longest: int | None
    _asked: Mapping[str, Any]
    _prompt_lengths: list[int]
    _starts: PrefixCache | None

    @property
    def pivoted_model(self) -> PivotedModel:
        """The model with the pivot in front."""
        raise NotImplementedError

    def _framing(self, token_ids: tuple[int, ...]) -> PivotFraming:
        """Raises PivotError for the head of chat prompts that this run renders otherwise."""
        self.chat_template_args = dict(self.chat.arguments)
        pivot = self.pivoted_model.pivot
        head = None if pivot is None else pivot.head
        self._is_head = check_captured_head(self.cell.pivot, token_ids, head, self.tokenizer, self.chat)
        first = self.prefix_token_id
        longer = len(token_ids) > 1 and token_ids[0] == first
        opens = longer and opens_messages(self.tokenizer, first, self.chat)
        return PivotFraming(token_ids, first, int(self.max_length), opens)

    def check_head(self, prompt: str, tokens: Sequence[int]) -> None:
        """Raise PivotError for a chat prompt that would stand behind the opening of another one.

        One whose message has run together with the head's last token gets a second head: warned of, and counted.
        """
        head = self.framing.token_ids
        if not self._is_head or tuple(tokens[: len(head)]) == head:
            return
        text, begins = (self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (head, tokens))
        if not prompt.startswith(text) and not begins.startswith(text):
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

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, as lm_eval's results record it.

        A comment in front says where another BOS than hf's is at work, so that no run is compared with one before.
        """
        text: str | None = super().chat_template(chat_template)
        return f"{_BOS_IS_ADDED}{text}" if text and bos_changes_tokens(self.tokenizer) else text

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts generated behind the pivot, each as lm_eval's `hf` generates it in a batch of one.

        Raises ConfigError, before anything is generated, for options or settings of the checkpoint that are no good.
        """
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        for places in groups.values():
            self._check_options([requests[place] for place in places])
        found: dict[int, str] = {}
        for places in groups.values():
            group = [requests[place] for place in places]
            self._asked = group[0].args[1]
            new = self._new_tokens(self._asked)
            self._longest = max(len(self.tok_encode(request.args[0])) for request in group) + new
            found.update(zip(places, super().generate_until(group, disable_tqdm), strict=True))
        return [found[place] for place in range(len(requests))]

    def _check_options(self, requests: Sequence[Instance]) -> None:
        """Raise ConfigError for what requests with the same options cannot be answered by."""
        options = requests[0].args[1]
        source = f"--gen_kwargs, or generation_kwargs of task {requests[0].task_name}"
        check_options(options, source)
        served(self.model.generation_config, options, self.pivoted_model.kv_quantizer is not None)
        new = int(normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"])
        if new >= self.max_length:
            raise ConfigError(
                f"max_gen_toks={new} leaves no room for a prompt: {self.max_length} tokens fit behind the pivot"
            )
        lengths = own_lengths(self.model.generation_config, options)
        if lengths.total is not None:
            longest = max(len(self.tok_encode(request.args[0])) for request in requests)
            longest = min(longest, self.max_length + len(self.framing.token_ids) - new)
            if longest >= lengths.total:
                raise ConfigError(
                    f"{source}: max_length={lengths.total} leaves no room behind a prompt of {longest} tokens, which "
                    "it counts too; choose the number of new tokens with max_gen_toks"
                )

    def _new_tokens(self, options: Mapping[str, Any]) -> int:
        """The most new tokens of a request."""
        new = int(normalize_gen_kwargs(dict(options), self.max_gen_toks)["max_gen_toks"])
        lengths = own_lengths(self.model.generation_config, options)
        return max(lengths.new or lengths.total or new, 1)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Texts -> left-padded bodies [B, T] and their mask: the pivot is taken off before anything is cut."""
        prompts = [self.tok_encode(text) for text in strings]
        bodies = [self.framing.body(prompt) for prompt in prompts]
        self._prompt_lengths = [len(prompt) for prompt in prompts]
        if left_truncate_len:
            self.framing.counts["truncated"] += sum(len(body) > left_truncate_len for body in bodies)
            bodies = [body[-left_truncate_len:] for body in bodies]
            most = left_truncate_len + len(self.framing.token_ids)
            self._prompt_lengths = [min(length, most) for length in self._prompt_lengths]
        longest = max(len(body) for body in bodies)
        ids = torch.tensor([[0] * (longest - len(body)) + body for body in bodies], dtype=torch.long)
        mask = torch.tensor([[0] * (longest - len(body)) + [1] * len(body) for body in bodies], dtype=torch.long)
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
        """Rows [B, T] -> the same with the new tokens behind them, as a tensor or as an object with `tolist`."""
        temperature = options.get("temperature", 0.0)
        if options.get("do_sample") is None:
            options["do_sample"] = temperature > 0
        if not options["do_sample"]:
            options.pop("temperature", None)
        mask, file = options.pop("attention_mask"), self.model.generation_config
        lengths = own_lengths(file, self._asked)
        if lengths.new is not None:
            say_length(lengths.new)
        if file.stop_strings is not None:
            options["tokenizer"] = self.tokenizer
        fill = self.filling_token
        rows = []
        for place, length in enumerate(self._prompt_lengths):
            new = lengths.new_tokens(length, max_length - context.shape[1])
            rows.append((new, lengths.least(length, new), None if fill is not None else place))
        found: list[list[int]] = [[] for _ in rows]
        for one in dict.fromkeys(rows):
            alike = torch.tensor([row == one for row in rows])
            new, least, _ = one
            first = int((mask[alike] == 0).sum(dim=1).min())
            made = generate(
                self.pivoted_model,
                context[alike][:, first:],
                mask[alike][:, first:],
                new,
                partial(row_stops, self.tokenizer, stop),
                self._starts,
                pad_token_id=0 if fill is None else fill,
                **for_generate(options if least is None else {**options, "min_new_tokens": least, "min_length": None}),
            )
            width = context.shape[1] - first  # behind it; beams without an EOS are filled up with -1
            for place, tokens in zip(torch.nonzero(alike)[:, 0].tolist(), made[:, width:].tolist(), strict=True):
                found[place] = context[place].tolist() + list(takewhile(lambda token: token >= 0, tokens))
        return _TokenRows(found)

    @cached_property
    def filling_token(self) -> int | None:
        """What fills up rows that have ended; None where there is no such token, so that rows are generated alone."""
        words = self.pivoted_model.words
        but = [self.think_end_token] if isinstance(self.think_end_token, int) else []
        return filling_token(self.tokenizer, words, but)


class _TokenRows(list[list[int]]):
    """Rows of tokens of unequal lengths."""

    def tolist(self) -> list[list[int]]:
        """The rows."""
        return self
