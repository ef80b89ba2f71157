"""IntactKVLM: lm_eval's `hf` model with the pivot in front of every request, on quantized weights.

Everything that `hf` takes keeps its meaning (devices, parallelize, dtype, tokenizer, chat templates, accelerate
launch); this class adds the cell's arguments, and does its own scoring and generation behind the pivot.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.assemble.chat_date import chat_settings, is_random
from intactkv_eval.assemble.checkpoint_info import CheckpointInfo
from intactkv_eval.assemble.checks import IN_MEMORY
from intactkv_eval.assemble.load_cell import Built, load_cell
from intactkv_eval.assemble.load_errors import (
    check_folder,
    check_layers,
    check_no_adapter,
    check_settings_file,
    check_words,
    loading,
)
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.assemble.model_objects import cell_of_object, named_tokenizer, take_objects
from intactkv_eval.assemble.source import ModelSource
from intactkv_eval.assemble.tokenizer_check import check_tokenizer
from intactkv_eval.cell.arguments import CELL_KEYS
from intactkv_eval.cell.records import RECORD_FORMAT
from intactkv_eval.chat.bos_text import encoded_prompt, splits_bos
from intactkv_eval.compat.lm_eval_api import Instance, rolling_text, simple_parse_args_string
from intactkv_eval.errors import ConfigError
from intactkv_eval.inference.batch_size import check_batch_size, rows_that_fit
from intactkv_eval.inference.generation.prefix_cache import PrefixCache
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.prefix_sharing import SharedModel
from intactkv_eval.inference.scoring.request_table import RequestScore
from intactkv_eval.inference.scoring.score import Counts, score
from intactkv_eval.lm.harness_flags import begin_command, chosen_flags
from intactkv_eval.lm.hf_arguments import chat_arguments, check_front, checked_cell
from intactkv_eval.lm.loading import CellLoading
from intactkv_eval.lm.multi_turn import MultiTurnGeneration
from intactkv_eval.lm.pair_checks import check_pairs, nothing_left
from intactkv_eval.lm.plugin import register
from intactkv_eval.lm.response_cache import guard_response_cache
from intactkv_eval.lm.run_record import cell_identity, facts_of_model, versions
from intactkv_eval.lm.token_text import TokenText
from intactkv_eval.model.devices import automatic_device
from intactkv_eval.pivot.tokens import use_chat_template
from intactkv_eval.sanitize import struck_record

logger = logging.getLogger(__name__)


class IntactKVLM(CellLoading, MultiTurnGeneration):
    """The model class `intactkv` of lm_eval.

    Arguments: those of a cell (cell/arguments.py, CELL_KEYS) and those of lm_eval's `hf`. `pretrained` may be a loaded
    PreTrainedModel. models: keeps models for the next cell of this process. Raises IntactKVError for anything that is
    wrong with the arguments.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel | None = None,
        models: ModelCache | None = None,
        **arguments: Any,
    ) -> None:
        own = {key: arguments.pop(key) for key in list(arguments) if key in CELL_KEYS}
        own["pretrained"] = pretrained
        self._objects = take_objects(own)
        self.cell = checked_cell(own, arguments)
        self.hf_arguments = {key: value for key, value in arguments.items() if value is not None}
        loaded = self._objects[IN_MEMORY].model if IN_MEMORY in self._objects else None
        if loaded is not None:
            self.cell = cell_of_object(loaded, self.cell, self.hf_arguments)
        arguments["batch_size"] = check_batch_size(arguments.get("batch_size"))
        arguments["device"] = str(arguments.get("device") or automatic_device())
        self._most_rows = arguments.get("max_batch_size")
        self._longest: int | None = None
        self._warned = False
        self._encoded = lru_cache(maxsize=2)(self._encode)
        self.built: Built | None = None
        self._checkpoint, self._models = CheckpointInfo(None, None), models
        chosen = {"revision": self.cell.model.revision, "dtype": self.cell.model.dtype}
        tokens = arguments["tokenizer"] = named_tokenizer(arguments.get("tokenizer"), loaded)
        named = tokens if loaded is not None and isinstance(tokens, str) else None
        with loading(f"pretrained={self.cell.model.pretrained!r}" if named is None else f"tokenizer={named!r}"):
            if loaded is None:
                check_folder(self.cell.model.pretrained)
                check_no_adapter(self.cell.model.pretrained)
                check_layers(self.cell.model.pretrained, self.cell.model.revision)
                check_settings_file(self.cell.model.pretrained, self.cell.model.revision)
            words = tokens if isinstance(tokens, str) else self.cell.model.pretrained
            check_folder(words)
            check_tokenizer(words, self.cell.model.revision)
            super().__init__(loaded if loaded is not None else self.cell.model.pretrained, **chosen, **arguments)
        if loaded is not None:
            reference = self.cell.model.reference
            with nullcontext() if reference is None else loading(f"reference={reference!r}"):
                self._take_object(arguments)
        check_front(self.hf_arguments, self.pivoted_model.token_ids, self.tokenizer)
        self._set_ranks()
        self._shared = SharedModel(self.pivoted_model)
        self._starts = PrefixCache(self._shared) if self.cell.share_prefix else None
        self.counts = Counts()
        self.framing = self._framing(self.pivoted_model.token_ids)
        if self.max_length < 1:
            raise ConfigError(f"max_length={self._max_length}: no room behind the pivot {self.framing.token_ids}")

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Any, additional_config: Any = None, models: ModelCache | None = None
    ) -> "IntactKVLM":
        """As lm_eval makes it: of the model's arguments, and of its own flags without defaults that nobody chose."""
        begin_command()
        return cls(models=models, **{**arg_dict, **chosen_flags(arg_dict, additional_config or {})})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Any = None) -> "IntactKVLM":
        """`create_from_arg_obj` of arguments as text."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def pivoted_model(self) -> PivotedModel:
        """The model with the pivot in front."""
        assert self.built is not None
        return self.built.pivoted

    @property
    def max_length(self) -> int:
        """The tokens that fit behind the pivot. Raises ConfigError where the config says no number of positions."""
        taken = len(self.built.pivoted.token_ids) if self.built is not None else 0
        with loading(f"pretrained={self.cell.model.pretrained!r}"):  # older transformers take any text for a number
            return int(super().max_length) - taken

    def get_model_info(self) -> dict[str, Any]:
        """What `hf` tells of a model, and the resolved cell under `intactkv`, for lm_eval's results JSON."""
        return {**super().get_model_info(), "intactkv": self.cell_record()}

    def cell_record(self) -> dict[str, Any]:
        """The cell as it was resolved: what was asked, the pivot's tokens and origin, how requests met it."""
        record = {
            "format": RECORD_FORMAT,
            **self._identity(),
            "chat_date": self.chat.date,
            "chat_template_is_random": is_random(self.tokenizer, self.chat),
            "requests_on_rank_0": dict(sorted(self.framing.counts.items())),
            "scoring_on_rank_0": asdict(self.counts),
            "handed_over": self._record_of_objects(),
            "world_size": self.world_size,
            "versions": versions(),
            **facts_of_model(self.model, self.built),
        }
        found: dict[str, Any] = struck_record(record)
        return found

    def set_cache_hook(self, cache_hook: Any) -> None:
        """lm_eval's response cache is keyed by the request alone: refuse one that another cell has filled."""
        guard_response_cache(cache_hook, self._identity(), self.chat.date)
        super().set_cache_hook(cache_hook)

    def _identity(self) -> dict[str, Any]:
        assert self.built is not None
        return cell_identity(self.cell, self.hf_arguments, self.built, self.tokenizer)

    # ---- loading ----

    def _create_tokenizer(self, *args: Any, **kwargs: Any) -> None:
        super()._create_tokenizer(*args, **kwargs)
        named = self.hf_arguments.get("tokenizer") or self.cell.model.pretrained
        if isinstance(named, str) and named != IN_MEMORY:
            check_words(self.tokenizer, named, self.cell.model.revision)
        if self.cell.pivot.chat_template:
            use_chat_template(self.tokenizer, self.cell.pivot.chat_template)
        self.chat = chat_settings(self.cell.pivot, self.tokenizer, chat_arguments(self.hf_arguments))

    def _build(self, load: Any) -> None:
        source = ModelSource(load, self.config, self.tokenizer, self._checkpoint, frozenset(self._modified), self.chat)
        self.built = load_cell(self.cell, source, self._models)
        self._model = self.built.pivoted.model

    def _set_ranks(self) -> None:
        """`hf` sets ranks for several GPUs only; under `accelerate launch --cpu` every process would be rank 0."""
        accelerator = getattr(self, "accelerator", None)
        if accelerator is not None and accelerator.num_processes > 1:
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    # ---- scoring ----

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of (context, continuation) requests; ConfigError where nothing is to score."""
        check_pairs(requests, self.tok_encode)
        scored: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        """Log-likelihood of whole texts, in windows that leave room for the pivot, in the form of lm_eval's release."""
        self._longest = max((len(self.tok_encode(rolling_text(request))) for request in requests), default=None)
        rolled: list[Any] = super().loglikelihood_rolling(requests, disable_tqdm)
        return rolled

    def tok_encode(self, string: str, *args: Any, **kwargs: Any) -> list[int]:
        """The tokens of a text, as lm_eval's `hf` makes them; a context that several continuations share only once.

        A BOS that a chat template has written is the one that the tokenizer adds (chat/bos_text.py).
        """
        if args or kwargs:
            encoded: list[int] = super().tok_encode(string, *args, **kwargs)
            return encoded
        return list(self._encoded(string))

    def _encode(self, string: str) -> list[int]:
        if splits_bos(self.tokenizer, string):
            return encoded_prompt(self.tokenizer, string)
        encoded: list[int] = super().tok_encode(string)
        return encoded

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if isinstance(context, TokenText) and isinstance(continuation, TokenText):
            return list(context.ids), list(continuation.ids)
        encoded: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        if continuation and not encoded[1]:
            raise nothing_left(
                context, continuation, encoded[0], self.tok_encode(context + continuation), self.tok_decode
            )
        return encoded

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """T tokens in, T rows of logits out, the pivot in front."""
        return self.pivoted_model.logits(inps)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for key, context, continuation in requests:
            if not continuation and isinstance(key, tuple) and key[0] == "" and key[1]:
                raise nothing_left("", key[1], context, continuation, self.tok_decode)
        framed = [
            self.framing.request(context, continuation, whole=_is_exact(key)) for key, context, continuation in requests
        ]
        hidden = disable_tqdm or self.rank != 0
        with tqdm(total=len(framed), desc="Running loglikelihood requests", disable=hidden) as bar:

            def done(index: int, result: RequestScore) -> None:
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], tuple(result))
                bar.update(1)

            scores = score(
                self._shared,
                framed,
                self._rows_for(override_bs),
                self.softmax_dtype or torch.float32,
                done,
                self.cell.share_prefix,
                self.counts,
            )
        self._warn_of_truncation()
        return [(item.log_likelihood, item.is_greedy) for item in scores]

    def _warn_of_truncation(self) -> None:
        cut = self.framing.counts["truncated"]
        if cut and not self._warned:
            logger.warning("%d contexts were cut from the left to fit; the results JSON counts them all", cut)
            self._warned = True

    def _rows_for(self, override: int | None) -> Any:
        if self.batch_size == "auto" and override is None:
            return self._rows_that_fit
        fixed = override or int(self.batch_size)
        return lambda tokens: fixed

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        """Rows that fit of the longest request's length: rolling windows and generation ask for it beforehand."""
        longest = min(self._longest or self.max_length, self.max_length)
        return self._rows_that_fit(longest)

    def _rows_that_fit(self, tokens: int) -> int:
        whole = not self._shared.head.is_plain
        return rows_that_fit(self.model, tokens, self.pivoted_model.device, self._most_rows, whole)


def _is_exact(key: Any) -> bool:
    """A request that its task has defined in tokens."""
    return isinstance(key, tuple) and isinstance(key[0], TokenText)


register()
