"""Forwards over rows behind a kept prefix, and how far a model lets prefixes be shared.

    TREES     many branches in one row, by mask and positions       sdpa and eager attention
    PREFIXES  rows of single sequences behind a kept prefix         any attention over a growing cache
    NOTHING   every sequence by itself, behind the pivot            any model

The families of our tests are known to allow all of it. Any other model is tried on a short text against the plain way
first, so that it is slow, not wrong. (Seen in bf16: 0.03 of noise, 0.17 for wrong positions, 0.4 for a wrong mask.)
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.transformers_api import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    attention_implementation,
    cache_layers,
)
from intactkv_eval.inference.batch_size import kv_bytes_per_token
from intactkv_eval.inference.padding_probe import TRIAL_ERRORS, disagreement, is_tested
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.inference.scoring.lm_head import LMHead
from intactkv_eval.inference.scoring.packed_rows import PackedRow, flatten, mask, padded
from intactkv_eval.inference.scoring.prefix_tree import Node, build_tree
from intactkv_eval.kv_cache.prefix_cache import SharedPrefixCache
from intactkv_eval.kv_quant.quantizer import LayerKV
from intactkv_eval.model.activation_quant import activations_off

logger = logging.getLogger(__name__)

_START, _ENDS = 24, (3, 5, 4, 5, 3)  # tokens of the text's start, and of each of its ends
KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Sharing(IntEnum):
    """How far prefixes are shared."""

    NOTHING = 0
    PREFIXES = 1
    TREES = 2


@dataclass(frozen=True, eq=False)
class Prefix:
    """What stands in front of rows: the KV of each layer [1, H, length, D]; `is_root`: the pivot's rows or nothing."""

    rows: list[LayerKV]
    length: int
    is_root: bool = False


class SharedModel:
    """A PivotedModel asked for rows behind a prefix. Where its pivot is not intact, sequences begin with its tokens."""

    def __init__(self, pivoted: PivotedModel) -> None:
        self.pivoted = pivoted

    @property
    def front(self) -> tuple[int, ...]:
        """The tokens that every sequence begins with."""
        return () if self.pivoted.pivot is not None else self.pivoted.token_ids

    @cached_property
    def head(self) -> LMHead:
        """The model's output embedding, asked where logits are needed."""
        return LMHead(self.pivoted.model)

    def for_length(self, length: int) -> "SharedModel":
        """The same in front of sequences of `length` positions. Raises PivotError as PivotedModel.for_length does."""
        fitting = self.pivoted.for_length(length)
        if fitting is self.pivoted:
            return self
        made = SharedModel(fitting)
        made.head = self.head
        return made

    @cached_property
    def root(self) -> Prefix:
        """The pivot's rows where they are intact, else nothing."""
        rows = [(keys[None], values[None]) for keys, values in self.pivoted.front_layers()]
        return Prefix(rows, rows[0][0].shape[2] if rows else 0, True)

    @cached_property
    def bytes_per_token(self) -> int:
        """Of KV, in all layers."""
        pivot = self.pivoted.pivot
        if pivot is not None and len(pivot):
            return sum(part.element_size() * part.numel() for part in (*pivot.keys, *pivot.values)) // len(pivot)
        return kv_bytes_per_token(self.pivoted.model)

    @torch.no_grad()
    def forward(self, prefix: Prefix, rows: Sequence[PackedRow], keep: bool = False) -> tuple[Any, list[LayerKV]]:
        """The output for right-padded rows [B, T] behind the prefix; with `keep` the KV of prefix and rows too."""
        ids, depths = padded(rows)
        device = self.pivoted.device
        positions = depths + self.root.length
        cache = SharedPrefixCache(prefix.rows, len(rows), self.pivoted.kv_quantizer, positions, keep)
        arguments: dict[str, Any] = {}
        if not all(row.is_chain for row in rows):
            masks = self._masks(rows, positions, prefix.length)
            arguments = {"attention_mask": masks, "position_ids": positions.to(device)}
        output = run_with_cache(self.pivoted.model, cache, ids.to(device), **arguments)
        return output, cache.rows() if keep else []

    @torch.no_grad()
    def plain_forward(self, rows: Sequence[PackedRow]) -> Any:
        """The model's output for rows of single sequences behind the pivot, as any model computes it.

        Its first columns are those of `pivoted.lead` pivot tokens.
        """
        return self.pivoted.forward(padded(rows)[0])

    def _masks(self, rows: Sequence[PackedRow], positions: Tensor, prefix: int) -> Any:
        made = {
            kind: mask(rows, positions, prefix, window, self.pivoted.model.dtype).to(self.pivoted.device)
            for kind, window in self.pivoted.windows.items()
        }
        return made if len(made) > 1 else next(iter(made.values()))

    @cached_property
    def sharing(self) -> Sharing:
        """The most that this model allows; what it does not allow is logged with its reason."""
        pivoted = self.pivoted
        if pivoted.kv_quantizer is not None and pivoted.kv_quantizer.in_groups:
            logger.info(
                "prefixes are not shared: kv_scheme=%s counts its groups along each sequence", pivoted.kv.scheme
            )
            return Sharing.NOTHING
        if pivoted.kv.bits < 16:  # rows are quantized one by one, and rounding would drown a trial
            return SharedModel(PivotedModel(pivoted.model, pivoted.token_ids, pivoted.pivot)).sharing
        return self._allowed(tried=not is_tested(pivoted.model))

    def _allowed(self, tried: bool) -> Sharing:
        reason = self._why_no_prefix() or (self._difference(self._kept_prefix) if tried else None)
        if reason:
            logger.warning("prefixes are not shared with this model, every request is computed whole: %s", reason)
            return Sharing.NOTHING
        reason = self._why_no_tree() or (self._difference(self._tree) or self._columns_in_between() if tried else None)
        if reason:
            logger.warning("branches do not share a row with this model, kept prefixes are used only: %s", reason)
            return Sharing.PREFIXES
        return Sharing.TREES

    def _why_no_prefix(self) -> str | None:
        layers = cache_layers(self.pivoted.model.config)
        other = next((layer for layer in layers if type(layer) not in {DynamicLayer, DynamicSlidingWindowLayer}), None)
        return None if other is None else f"it keeps its past in a {type(other).__name__}"

    def _why_no_tree(self) -> str | None:
        used = attention_implementation(self.pivoted.model)
        if used not in {"sdpa", "eager"}:
            return f"attention {used!r} takes no mask of its own"
        unknown = set(self.pivoted.windows) - KNOWN_LAYERS
        return f"layers of kind {', '.join(sorted(unknown))}" if unknown else None

    def _columns_in_between(self) -> str | None:
        """Between a branch and its start stand other branches."""
        return "its attention counts columns, not tokens" if self.pivoted.columns.counted_anywhere else None

    def _difference(self, shared: Any) -> str | None:
        """What `shared` gives for a text of several ends against the plain way: what is wrong, or None.

        Without activation quantizers: each token is rounded by itself, and rounding would drown a trial.
        """
        with activations_off(self.pivoted.model):
            return self._difference_now(shared)

    def _difference_now(self, shared: Any) -> str | None:
        draw = np.random.default_rng(0)
        words = self.pivoted.model.get_input_embeddings().weight.shape[0]
        start = np.array([*self.front, *draw.integers(0, words, _START)], np.int32)
        made = [np.concatenate([start, draw.integers(0, words, count)]).astype(np.int32) for count in _ENDS]
        sequences = build_tree(made).sequences
        leaves = [flatten([Node(0, len(one), place, place + 1)], sequences) for place, one in enumerate(sequences)]
        plain = self.plain_forward(leaves).logits
        lead = self.pivoted.lead(max(map(len, sequences)))
        expected = torch.stack([plain[place, lead + len(one) - 1] for place, one in enumerate(sequences)]).double()
        try:
            found = shared(sequences).double().to(expected.device)
        except TRIAL_ERRORS as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        return disagreement(found, expected, plain.dtype)

    def _kept_prefix(self, sequences: list[Any]) -> Tensor:
        root = build_tree(sequences).root
        start = flatten([Node(0, root.end, 0, 1)], sequences)
        prefix = Prefix(self.forward(self.root, [start], keep=True)[1], self.root.length + root.end)
        ends = [flatten([Node(root.end, len(one), place, place + 1)], sequences) for place, one in enumerate(sequences)]
        logits = self.forward(prefix, ends)[0].logits
        return torch.stack([logits[place, len(end.tokens) - 1] for place, end in enumerate(ends)])

    def _tree(self, sequences: list[Any]) -> Tensor:
        row = flatten([build_tree(sequences).root], sequences)
        logits: Tensor = self.forward(self.root, [row])[0].logits[0]
        ends = [column + node.end - node.start - 1 for node, column, _ in row.spans if not node.children]
        return logits[torch.tensor(ends)]
