"""The walk through a model's decoder layers on calibration samples: each layer's inputs, and how it is run alone.

What a layer is called with besides hidden states (positions, masks) is noted in one forward of each length. With a
pivot, samples stand behind the pivot's KV as at inference, and the pivot's own activations are in no statistic.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.kv_cache.single_use import SingleForwardCache
from intactkv_eval.model.layer_calls import LayerCall
from intactkv_eval.model.structure import decoder_layers, layer_devices, linear_layers
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.quantize.block_walk_check import check_walk
from intactkv_eval.quantize.method import Block


class _BlockRows(NamedTuple):
    """Rows of the pivot, as SingleForwardCache takes them."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


class _Enough(Exception):
    """A forward has shown what it was run for."""


class BlockWalk:
    """The decoder layers of `model`, in order. samples: windows [T] of tokens.

    keep_full: the inputs that the full-precision model makes are kept too. device: where a layer is while it is worked
    on; hidden states stay on the model's own.
    Raises UnsupportedModelError where layers that are run one by one do not compute what the model does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        samples: Sequence[Tensor],
        pivot: PivotKV | None = None,
        keep_full: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self._model, self._device = model, device
        self._pivot = None if pivot is None else _BlockRows(pivot.keys, pivot.values)
        self._prefix, self._layers = decoder_layers(model)
        self._linear = linear_layers(model)
        self._devices = layer_devices(model)
        self.inputs: list[Tensor] = []
        self._calls: dict[int, list[LayerCall]] = {}
        if samples:
            new_cache = partial(self._cache, model.dtype, self._devices)
            check_walk(model, list(self._layers), samples, self.run_model, new_cache, self._devices)
        self._note(samples)
        self._full = list(self.inputs) if keep_full else None
        self._next_full: list[Tensor] | None = None

    def __len__(self) -> int:
        return len(self._layers)

    def name(self, index: int) -> str:
        """The full name of a layer."""
        return f"{self._prefix}.{index}"

    def block(self, index: int) -> Block:
        """Layer `index`, before it is quantized."""
        module, start = self._layers[index], f"{self.name(index)}."
        if self._device is not None:
            module.to(self._device)
        layers = {name.removeprefix(start): one for name, one in self._linear.items() if name.startswith(start)}

        def run(hidden: Tensor, sample: int) -> Tensor:
            return self._run(index, hidden)

        if self._full is not None:
            self._next_full = self._through(index, self._full)
        divide = None if self._pivot is None else partial(self._divide_values, index)
        return Block(self.name(index), module, layers, self.inputs, run, self._full, divide)

    def _divide_values(self, index: int, factor: Tensor) -> None:
        """The pivot's values [H, P, D] follow those of layer `index`, whose channels were divided by `factor` [H*D]."""
        assert self._pivot is not None
        values = list(self._pivot.values)
        heads, _, width = values[index].shape
        values[index] = values[index] / factor.view(heads, 1, width).to(values[index])
        self._pivot = self._pivot._replace(values=tuple(values))

    def advance(self, index: int) -> None:
        """Go on to the next layer with what layer `index`, as it is now, makes of its inputs."""
        self.inputs = self._through(index, self.inputs) if index + 1 < len(self) else []
        self._full = self._next_full
        if self._device is not None:
            self._layers[index].to(self._devices[index])

    @torch.no_grad()
    def run_model(self, sample: Tensor) -> None:
        """The whole model, as it is now, on a sample [T] behind the pivot's rows; never on the pivot's own tokens."""
        cache = self._cache(self._model.dtype, self._devices)
        ids = sample[None].to(self._model.get_input_embeddings().weight.device)
        run_with_cache(self._model, cache, ids)

    @torch.no_grad()
    def _through(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        return [self._run(index, one).to(one.device) for one in hidden]

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        call = self._calls[hidden.shape[1]][index]
        devices = self._devices if self._device is None else [self._device] * len(self._devices)
        return call.run(self._layers[index], hidden, self._cache(hidden.dtype, devices), devices[index])

    def _cache(self, dtype: torch.dtype, devices: list[torch.device]) -> SingleForwardCache | None:
        if self._pivot is None:
            return None
        rows = _BlockRows(*(tuple(part.to(dtype) for part in kind) for kind in self._pivot))
        return SingleForwardCache(self._model.config, 1, None, rows, devices[: len(rows.keys)])

    @torch.no_grad()
    def _note(self, samples: Sequence[Tensor]) -> None:
        """The first layer's input of every sample, and each layer's call for every length of sample."""
        for sample in samples:
            calls: list[LayerCall] = []
            known = len(sample) in self._calls

            hooks = [
                layer.register_forward_pre_hook(self._noting(calls, known), with_kwargs=True) for layer in self._layers
            ]
            ids = sample[None].to(self._model.get_input_embeddings().weight.device)
            cache = self._cache(self._model.dtype, self._devices)
            try:
                run_with_cache(self._model, cache, ids)
            except _Enough:
                continue
            finally:
                for hook in hooks:
                    hook.remove()
            self._calls[len(sample)] = calls

    def _noting(self, calls: list[LayerCall], known: bool) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, call = LayerCall.of(args, kwargs)
            if module is self._layers[0]:
                self.inputs.append(hidden)
                if known:
                    raise _Enough
            calls.append(call)

        return note
