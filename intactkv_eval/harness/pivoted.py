"""PivotedModel: a causal LM with the pivot in front of every row, whatever is asked of it.

    intact:      a fresh cache that starts with the captured rows, then the body
    not intact:  the pivot's tokens and the body, all computed (and KV-quantized) by the model itself

Knows tokens and tensors; no text, no lm_eval.
"""

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.cache.pivot_cache import FrontRows, PivotCache
from intactkv_eval.config import KVSpec
from intactkv_eval.errors import PivotError
from intactkv_eval.model.structure import layer_devices
from intactkv_eval.pivot.kv import PivotKV

_LONG = 128  # tokens of a body, and as many for each of eight pivot tokens, from which these are computed again


class PivotedModel:
    """`model` with P pivot tokens in front. `pivot` is their full-precision KV, or None where it is not intact.

    Raises PivotError where the PivotKV is of other tokens, or of another number of layers.
    """

    def __init__(
        self, model: PreTrainedModel, token_ids: tuple[int, ...], pivot: PivotKV | None, kv: KVSpec | None = None
    ) -> None:
        if pivot is not None and pivot.token_ids != token_ids:
            raise PivotError(f"PivotKV of tokens {list(pivot.token_ids)} given for tokens {list(token_ids)}")
        self.model, self.token_ids, self.pivot, self.kv = model, token_ids, pivot, kv or KVSpec()
        if pivot is not None and len(pivot.keys) != len(self.devices):
            raise PivotError(f"the PivotKV has {len(pivot.keys)} layers, this model {len(self.devices)}")

    @property
    def device(self) -> torch.device:
        """Where input ids go: the embedding's device (under device_map not every layer's)."""
        embeddings: Tensor = self.model.get_input_embeddings().weight
        return embeddings.device

    @cached_property
    def devices(self) -> list[torch.device]:
        """The device of each layer's KV."""
        return layer_devices(self.model)

    @cached_property
    def pivot_logits(self) -> Tensor:
        """[P, V]: the full-precision model's own where intact, else what the evaluated model says."""
        if self.pivot is not None:
            return self.pivot.logits.to(self.device)
        if not self.token_ids:
            raise PivotError("there is no pivot, so no token predicts the first one of an empty context")
        return self._call(torch.tensor([self.token_ids], device=self.device), cache=self._own_cache(1))[0]

    def new_cache(self, batch_size: int, padding: Tensor | None = None, front: FrontRows | None = None) -> PivotCache:
        """A fresh cache, which begins with `front`, or with the pivot's rows where they are intact.

        padding: [B] of left-padded rows.
        """
        return PivotCache(self.model.config, batch_size, self.kv, front or self.pivot, self.devices, padding)

    @cached_property
    def window(self) -> int | None:
        """The shortest sliding window among the layers, None where every layer sees all."""
        layers = PivotCache(self.model.config, 1, self.kv).layers
        return min((layer.sliding_window for layer in layers if getattr(layer, "is_sliding", False)), default=None)

    def body_logits(self, bodies: Tensor) -> Tensor:
        """Right-padded bodies [B, T], T > 0 -> logits [B, T, V]; the pivot stands in front of each row."""
        bodies = bodies.to(self.device)
        if self.pivot is not None:
            ids, cache, lead = self.behind_pivot(bodies)
            return self._call(ids, cache)[:, lead:]
        front = torch.tensor(self.token_ids, dtype=torch.long, device=self.device).expand(len(bodies), -1)
        whole = torch.cat([front, bodies], dim=1)
        return self._call(whole, cache=self._own_cache(len(bodies)))[:, len(self.token_ids) :]

    def behind_pivot(self, bodies: Tensor) -> tuple[Tensor, PivotCache, int]:
        """Bodies [B, T] behind the intact rows: ids [B, lead + T], their cache, and `lead`.

        Behind rows that are cached, attention needs a mask, which costs twice its work. So long bodies get the pivot's
        tokens in front (lead = P), are computed in plain causal attention, and the rows of these tokens are replaced.
        """
        length = len(self.token_ids)
        if bodies.shape[1] < _LONG * max(1, length // 8):
            return bodies, self.new_cache(len(bodies)), 0
        front = torch.tensor(self.token_ids, dtype=torch.long, device=bodies.device).expand(len(bodies), -1)
        cache = PivotCache(self.model.config, len(bodies), self.kv, self.pivot, self.devices, computed=True)
        return torch.cat([front, bodies], dim=1), cache, length

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
        front = self.pivot_logits.expand(len(inputs), -1, -1)
        if inputs.shape[1] == length:
            return front.clone()
        body = self.body_logits(inputs[:, length:])
        return torch.cat([front.to(body.device), body], dim=1)

    def _own_cache(self, batch_size: int) -> PivotCache | None:
        """The cache of a call without intact rows: needed only where the KV is quantized."""
        return self.new_cache(batch_size) if self.kv.bits < 16 else None

    @torch.no_grad()
    def _call(self, ids: Tensor, cache: PivotCache | None) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).logits
        return logits
