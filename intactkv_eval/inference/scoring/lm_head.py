"""Logits only where they are needed: the output embedding gets the chosen tokens of a forward, a slice at a time.

A model whose logits are the output embedding's own (most) is asked for slices, so that no matrix of all tokens times
the vocabulary exists; one that changes them afterwards (soft-capped, scaled) makes all chosen ones in its own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.model.structure import text_config

# Config keys of what models do to their logits.
_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logit_soft_cap", "lm_head_multiplier")
SLICE_BYTES = 32 * 2**20  # of fp32 logits at once


class LMHead:
    """The output embedding of `model`, seen from a forward that is run for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @cached_property
    def module(self) -> nn.Module | None:
        """The output embedding, or None where the model names none."""
        found = self.model.get_output_embeddings()
        return found if isinstance(found, nn.Module) else None

    @cached_property
    def is_plain(self) -> bool:
        """Whether the model's logits are what this module gives: by its config, and tried on four tokens."""
        config: Any = text_config(self.model)
        if self.module is None or any(getattr(config, key, None) not in {None, 1} for key in _CHANGES):
            return False
        ids = torch.arange(4, device=self.model.get_input_embeddings().weight.device)[None]
        with torch.no_grad(), self._hidden(torch.arange(4), keep=True) as hidden:
            logits = self.model(input_ids=ids, **cache_argument(self.model, None)).logits[0]
        with torch.no_grad():
            again = self.module(hidden[0])
        if again.shape != logits.shape:
            return False
        worst = float((again - logits.to(again.device)).abs().max() / logits.abs().max())
        return worst <= (1e-5 if logits.dtype in {torch.float32, torch.float64} else 2e-2)

    def logits(self, forward: Callable[[], Any], places: Tensor) -> Iterator[Tensor]:
        """Logits [n, V] at `places` [N] (row * T + column) of one forward of rows [B, T], in slices, in order."""
        if self.module is None:
            whole = forward().logits
            yield whole.reshape(-1, whole.shape[-1])[places.to(whole.device)]
            return
        plain = self.is_plain
        with self._hidden(places, keep=not plain) as hidden:
            whole = forward().logits
        if not plain:
            if len(places):
                yield whole[0]
            return
        if not len(places):
            return
        size = max(1, SLICE_BYTES // (4 * whole.shape[-1]))
        del whole
        for start in range(0, len(places), size):
            yield self.module(hidden[0][start : start + size])

    @contextmanager
    def _hidden(self, places: Tensor, keep: bool) -> Iterator[list[Tensor]]:
        """While it lasts, the module's chosen inputs [N, C] are noted; it computes only them, or next to nothing."""
        noted: list[Tensor] = []

        def choose(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states = args[0]
            noted.append(states.reshape(-1, states.shape[-1])[places.to(states.device)])
            return (noted[0][None] if keep and len(places) else states[:1, :1], *args[1:])

        assert self.module is not None
        hook = self.module.register_forward_pre_hook(choose)
        try:
            yield noted
        finally:
            hook.remove()


def log_probabilities(logits: Tensor, rows: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """logits [n, V]; pairs [m] of row and target -> log-probabilities [m] in `dtype`, and whether each is greedy."""
    rows, targets = rows.to(logits.device), targets.to(logits.device)
    logits = logits.to(dtype)
    chosen = logits[rows, targets]
    highest = logits.amax(dim=-1)
    greedy = chosen == highest[rows]
    if greedy.any():  # of equal logits the first is the greedy one
        winners = torch.unique(rows[greedy])
        first = torch.full((len(logits),), -1, device=logits.device)
        first[winners] = logits[winners].argmax(dim=-1)
        greedy &= first[rows] == targets
    return chosen - torch.logsumexp(logits, dim=-1)[rows], greedy
