"""The generating half of IntactKVLM: lm_eval's requests and options, generated behind the pivot."""

from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from transformers import StoppingCriteriaList

from intactkv_eval.errors import ConfigError
from intactkv_eval.harness.framing import Framing
from intactkv_eval.harness.generation import generate
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.harness.shared_start import SharedStart


class PivotedGeneration(HFLM):
    """`hf` whose generation stands behind a pivot. What it uses is made by the class that inherits it."""

    framing: Framing
    _longest: int | None
    _starts: SharedStart | None

    @property
    def pivoted_model(self) -> PivotedModel:
        """The model with the pivot in front."""
        raise NotImplementedError

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
