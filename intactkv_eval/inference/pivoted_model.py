"""PivotedModel: a causal LM with the pivot in front of every row, whatever is asked of it.

    intact:      a fresh cache that starts with the captured rows, then the body
    not intact:  the pivot's tokens and the body, all computed (and KV-quantized) by the model itself

Whole rows, whose KV is quantized in groups, have both their copies side by side in one forward (kv_cache/grouped.py).
Knows tokens and tensors; no text, no lm_eval.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.rope_length import (
    as_in_text_of,
    first_position_is_same,
    forget_long_texts,
    rope_by_length,
)
from intactkv_eval.errors import PivotError
from intactkv_eval.inference.padding_probe import PaddingProbe
from intactkv_eval.kv_cache.grouped import SideBySideCache, StreamCache, TokenGroups
from intactkv_eval.kv_cache.pivot_cache import FrontRows, PivotCache, QuantizedRows
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.kv_quant.quantizer import KVQuantizer, LayerKV, kv_quantizer_of
from intactkv_eval.model.structure import cache_devices, text_config
from intactkv_eval.pivot.kv import PivotKV

_LONG = 128  # tokens of a body, and as many for each of eight pivot tokens, from which these are computed again
_PIECE = 512  # tokens of a prompt that are computed at once in front of a cache that is quantized in groups


class PivotedModel:
    """`model` with P pivot tokens in front. `pivot` is their full-precision KV, or None where it is not intact.

    codebook: what kv_scheme=pre_rope rounds to. in_long_texts: the same in front of texts so long that the RoPE
    frequencies are others, where it is not this pivot's own rows for these. Raises PivotError where the PivotKV is of
    other tokens, or of another number of layers; ConfigError or UnsupportedModelError where the scheme of the KV cache
    does not fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        token_ids: tuple[int, ...],
        pivot: PivotKV | None,
        kv: KVSpec | None = None,
        codebook: Codebook | None = None,
        in_long_texts: "PivotedModel | None" = None,
    ) -> None:
        if pivot is not None and pivot.token_ids != token_ids:
            raise PivotError(f"PivotKV of tokens {list(pivot.token_ids)} given for tokens {list(token_ids)}")
        self.model, self.token_ids, self.pivot = model, token_ids, pivot
        self.kv, self.codebook = kv or KVSpec(), codebook
        self.rope, self._in_long_texts = rope_by_length(model.config), in_long_texts
        self.kv_quantizer: KVQuantizer | None = kv_quantizer_of(
            self.kv, model, codebook
        )  # at once: it may try the model
        if pivot is not None and len(pivot.keys) != len(self.devices):
            raise PivotError(f"the PivotKV has {len(pivot.keys)} layers, this model {len(self.devices)}")

    @property
    def device(self) -> torch.device:
        """Where input ids go: the embedding's device (under device_map not every layer's)."""
        embeddings: Tensor = self.model.get_input_embeddings().weight
        return embeddings.device

    @property
    def words(self) -> int:
        """The token ids that the model can be given: the rows of its input embeddings."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def devices(self) -> list[torch.device]:
        """The device of each layer's KV."""
        return cache_devices(self.model)

    def for_length(self, length: int) -> "PivotedModel":
        """The same in front of rows of `length` positions, the pivot's among them: with rows of their RoPE frequencies.

        Raises PivotError where the pivot was not captured with these.
        """
        if self.pivot is None or not self.rope.is_beyond(length):
            return self
        if self._in_long_texts is None:
            self._in_long_texts = self._with_rows_for_long_texts(self.pivot)
        return self._in_long_texts

    def _with_rows_for_long_texts(self, pivot: PivotKV) -> "PivotedModel":
        rows = pivot.in_long_texts()
        if rows is None and len(pivot) == 1 and first_position_is_same(self.model):
            return self
        if rows is None:
            raise PivotError(
                f"this PivotKV of {len(pivot)} tokens was captured with the RoPE frequencies of texts of up to "
                f"{self.rope.border} tokens, and {type(self.model).__name__} has other frequencies beyond: its rows "
                "would be wrong there. Score shorter texts (max_length, fewer shots), or use pivot=bos or intact=false"
            )
        return _InLongTexts(self.model, self.token_ids, rows, self.kv, self.codebook)

    @property
    def exempt(self) -> int:
        """The first tokens of a row whose KV is never quantized."""
        intact = len(self.token_ids) if self.pivot is not None and not self.kv.quantize_pivot else 0
        return max(intact, self.kv.sink_tokens)

    @cached_property
    def front_rows(self) -> FrontRows | None:
        """The rows that caches begin with: the intact pivot's, exact unless the cell does not exempt them.

        Rows that are quantized in groups stay exact here: their group is quantized when it is old enough.
        """
        if self.pivot is None or not self.kv.quantize_pivot or self.kv_quantizer is None or self.kv_quantizer.in_groups:
            return self.pivot
        return QuantizedRows.of(self.pivot, self.kv_quantizer, self.devices)

    def front_layers(self) -> list[LayerKV]:
        """Keys and values [H, P, D] of `front_rows` on each layer's device; nothing where there is none."""
        if self.front_rows is None:
            return []
        pairs = zip(self.front_rows.keys, self.front_rows.values, self.devices, strict=True)
        return [(keys.to(device), values.to(device)) for keys, values, device in pairs]

    @cached_property
    def pivot_logits(self) -> Tensor:
        """[P, V]: the full-precision model's own where intact, else what the evaluated model says."""
        if self.pivot is not None:
            return self.pivot.logits.to(self.device)
        if not self.token_ids:
            raise PivotError("there is no pivot, so no token predicts the first one of an empty context")
        logits: Tensor = self.forward(torch.tensor([self.token_ids])).logits[0]
        return logits

    def _pivot_logits_in_text_of(self, length: int) -> Tensor:
        """[P, V]: `pivot_logits` in front of rows of `length` positions, the pivot's among them."""
        if self.pivot is not None or not self.rope.is_beyond(length):
            return self.pivot_logits
        with as_in_text_of(self.model, length):
            logits: Tensor = self.forward(torch.tensor([self.token_ids])).logits[0]
        return logits

    def _frequencies_of(self, length: int) -> AbstractContextManager[None]:
        """The RoPE frequencies of a row of `length` positions, while it is computed piece by piece."""
        return as_in_text_of(self.model, length) if self.rope.is_beyond(length) else nullcontext()

    def new_cache(self, batch_size: int, padding: Tensor | None = None, front: FrontRows | None = None) -> PivotCache:
        """A fresh cache, which begins with `front`, or with the pivot's rows where they are intact.

        padding: [B] of left-padded rows.
        """
        return PivotCache(
            self.model.config, batch_size, self.kv_quantizer, front or self.front_rows, self.devices, padding
        )

    @cached_property
    def columns(self) -> PaddingProbe:
        """What padding in the middle of a row does to the model."""
        return PaddingProbe(self.model)

    @property
    def window(self) -> int | None:
        """The shortest sliding window among the layers, None where every layer sees all."""
        return self.columns.window

    @cached_property
    def windows(self) -> dict[str, int | None]:
        """The kinds of attention layers, and how many positions each sees."""
        config: Any = text_config(self.model)
        kinds = getattr(config, "layer_types", None)
        kinds = kinds or ["full_attention" if self.window is None else "sliding_attention"]
        return {kind: self.window if kind == "sliding_attention" else None for kind in sorted(set(kinds))}

    def lead(self, tokens: int) -> int:
        """How many pivot tokens `forward` computes in front of bodies of so many tokens.

        Behind rows that are cached, attention needs a mask, which costs twice its work. So long bodies have an intact
        pivot's tokens in front, plain causal attention, and the rows of these tokens are replaced by the intact ones.
        """
        in_groups = self.kv_quantizer is not None and self.kv_quantizer.in_groups
        length = len(self.token_ids)
        return length if self.pivot is not None and not in_groups and tokens >= _LONG * max(1, length // 8) else 0

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Any:
        """The output for right-padded rows [B, T] behind the pivot's rows, or behind nothing where it is not intact.

        Its first columns are those of `lead(T)` pivot tokens.
        """
        ids = ids.to(self.device)
        if self.lead(ids.shape[1]):
            front = torch.tensor(self.token_ids, dtype=torch.long, device=ids.device).expand(len(ids), -1)
            whole, front_rows = torch.cat([front, ids], dim=1), self.front_rows
            replacing = PivotCache(
                self.model.config, len(ids), self.kv_quantizer, front_rows, self.devices, computed=True
            )
            return run_with_cache(self.model, replacing, whole)
        if self.kv_quantizer is not None and self.kv_quantizer.in_groups:
            return self.forward_in_groups(ids, self.kv_quantizer)
        cache = self.new_cache(len(ids)) if self.pivot is not None or self.kv_quantizer is not None else None
        return run_with_cache(self.model, cache, ids)

    @torch.no_grad()
    def forward_in_groups(self, ids: Tensor, kv_quantizer: KVQuantizer, cache: SideBySideCache | None = None) -> Any:
        """The same, with each row of the cache quantized by `kv_quantizer` and in full side by side.

        cache: what stands in front and, if it keeps rows, gets these too; without it the pivot's rows stand in front.
        """
        groups = self._groups(kv_quantizer)
        if cache is None:
            cache = SideBySideCache(self.front_layers(), len(ids), kv_quantizer.scheme, groups)
        first = cache.get_seq_length()
        total = first + ids.shape[1]
        masks = {
            kind: groups.mask(first, total, window, self.model.dtype).to(self.device).expand(len(ids), -1, -1, -1)
            for kind, window in self.windows.items()
        }
        positions = torch.arange(first, total, device=self.device).expand(len(ids), -1)
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
        return run_with_cache(self.model, cache, ids, attention_mask=mask, position_ids=positions)

    @torch.no_grad()
    def prefilled(self, ids: Tensor) -> StreamCache:
        """The cache of rows [B, P + T] without padding, the pivot's tokens among them, computed but for the last token.

        For schemes that quantize in groups: each token sees the cache as it would one at a time.
        """
        assert self.kv_quantizer is not None, "nothing is quantized"
        ids, groups = ids.to(self.device), self._groups(self.kv_quantizer)
        cache = SideBySideCache(self.front_layers(), len(ids), self.kv_quantizer.scheme, groups, keep=True)
        with self._frequencies_of(ids.shape[1]):
            for start in range(cache.get_seq_length(), ids.shape[1] - 1, _PIECE):  # long masks are large
                self.forward_in_groups(ids[:, start : min(start + _PIECE, ids.shape[1] - 1)], self.kv_quantizer, cache)
        return StreamCache(cache.rows(), len(ids), self.kv_quantizer.scheme, groups)

    def body_logits(self, bodies: Tensor) -> Tensor:
        """Right-padded bodies [B, T], T > 0 -> logits [B, T, V]; the pivot stands in front of each row."""
        length = len(self.token_ids) + bodies.shape[1]
        if self.rope.grows and not self.rope.is_beyond(length):
            forget_long_texts(self.model)
        return self.for_length(length)._body_logits(bodies)

    def _body_logits(self, bodies: Tensor) -> Tensor:
        taken = 0 if self.pivot is not None else len(self.token_ids)
        front = torch.tensor(self.token_ids[:taken], dtype=torch.long).to(bodies.device).expand(len(bodies), -1)
        logits: Tensor = self.forward(torch.cat([front, bodies], dim=1)).logits
        return logits[:, taken + self.lead(bodies.shape[1]) :]

    def logits(self, inputs: Tensor) -> Tensor:
        """Rows [B, T] -> logits [B, T, V]: T tokens in, T rows out.

        A row that begins with the pivot's tokens is stripped of them and gets the pivot's own logits back in front;
        any other row has the pivot put in front.
        """
        inputs = inputs.to(self.device)
        length = len(self.token_ids)
        if not length or inputs.shape[1] < length:
            return self.body_logits(inputs)
        starts = (inputs[:, :length] == torch.tensor(self.token_ids, device=self.device)).all(dim=1)
        if not starts.any():
            return self.body_logits(inputs)
        if not starts.all():
            parts = inputs.new_empty(inputs.shape, dtype=self.pivot_logits.dtype).unsqueeze(-1)
            parts = parts.repeat(1, 1, self.pivot_logits.shape[-1])
            parts[starts], parts[~starts] = self.logits(inputs[starts]), self.body_logits(inputs[~starts])
            return parts
        front = self.for_length(inputs.shape[1])._pivot_logits_in_text_of(inputs.shape[1]).expand(len(inputs), -1, -1)
        if inputs.shape[1] == length:
            return front.clone()
        body = self.body_logits(inputs[:, length:])
        return torch.cat([front.to(body.device), body], dim=1)

    def _groups(self, kv_quantizer: KVQuantizer) -> TokenGroups:
        return TokenGroups(self.exempt, kv_quantizer.scheme.recent)


class _InLongTexts(PivotedModel):
    """A PivotedModel whose pivot rows are those of texts beyond the border of its RoPE frequencies."""

    def for_length(self, length: int) -> PivotedModel:
        """Itself: it is asked for such texts alone."""
        return self

    @cached_property
    def front_rows(self) -> FrontRows | None:
        """As PivotedModel has it; what undoes RoPE to quantize a key undoes it with these frequencies."""
        with self._frequencies_of((self.rope.border or 0) + 1):
            return super().front_rows
