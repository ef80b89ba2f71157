"""The quantized model behind rows that are trained: its loss against the full-precision model, and their gradient.

    loss = sum over layers of mean((y - t)^2) / 2,    y, t: a layer's outputs of the counted tokens, quantized and full

The model is frozen. With `recompute` the gradient goes back layer by layer, each computed again from its inputs, which
wait in a file: in memory are one layer's activations. Without it the whole forward is kept.
Source: IntactKV, section 3.3 (the loss of its released code, which halves the mean).
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.kv_cache.pivot_cache import PivotCache
from intactkv_eval.model.hooks import hidden_of, watched
from intactkv_eval.model.layer_calls import LayerCall
from intactkv_eval.model.structure import cache_devices, decoder_layers
from intactkv_eval.training.examples import Example, counted_nll
from intactkv_eval.training.trainable_kv import TrainedRows, run_behind

Targets = Sequence[Tensor]
"""Of each layer, the full-precision outputs [N, C] of the counted tokens."""


class Quality(NamedTuple):
    """Means over examples. blocks: the loss; last: that of the last layer; nll: of the assistant's tokens, each."""

    blocks: float
    last: float
    nll: float


class Student:
    """`model` behind `rows`, which alone are trained.

    recompute: gradients are computed layer by layer. Raises UnsupportedModelError where a layer's rows act in others.
    """

    def __init__(self, model: PreTrainedModel, rows: TrainedRows, recompute: bool = True) -> None:
        check_recompute(model, recompute)
        self.model, self.rows, self._recompute = model, rows, recompute
        self._scale = 2.0**10 if model.dtype is torch.float16 else 1.0
        self._layers = decoder_layers(model)[1]
        self._devices = cache_devices(model)

    def add_gradient(self, example: Example, targets: Targets, share: float) -> Tensor:
        """The loss [L] of each layer on one example; `share` of its gradient is added to the rows' own.

        In fp16 it is 1024 times as large on its way: a mean over so many numbers has gradients too small for fp16.
        """
        parameters = self.rows.parameters()
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        with _frozen(self.model):
            losses = (self._layer_by_layer if self._recompute else self._whole)(example, targets, share * self._scale)
        for parameter, held in zip(parameters, before, strict=True):
            assert parameter.grad is not None
            parameter.grad.div_(self._scale)
            parameter.grad = parameter.grad if held is None else held.add_(parameter.grad)
        return losses

    @torch.no_grad()
    def quality(self, examples: Sequence[Example], targets: Iterator[Targets]) -> Quality:
        """How near the model is to the full-precision one on `examples`."""
        losses, nll, tokens = torch.zeros(len(self._layers), dtype=torch.float64), 0.0, 0
        for example, wanted in zip(examples, targets, strict=True):
            with self._losses(wanted, example) as found:
                logits = self._run(self.model, example).logits[0]
            losses += torch.stack(found).double().cpu()
            of_tokens = counted_nll(logits, example)
            nll, tokens = nll + float(of_tokens.sum()), tokens + len(of_tokens)
        losses /= len(examples)
        return Quality(float(losses.sum()), float(losses[-1]), nll / max(tokens, 1))

    def _run(self, module: Any, example: Example) -> Any:
        return run_behind(module, self.model, self.rows.cast(self.model.dtype), self._devices, example.body)

    def _whole(self, example: Example, targets: Targets, share: float) -> Tensor:
        with self._losses(targets, example) as losses:
            self._run(self.model.base_model, example)
        total = torch.stack([loss.to(losses[0].device) for loss in losses])
        (total.sum() * share).backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def _layer_by_layer(self, example: Example, targets: Targets, share: float) -> Tensor:
        with tempfile.TemporaryFile() as file:
            inputs = _Waiting(file)
            calls = self._note(example, inputs)
            losses, later = [], None
            for layer in reversed(range(len(self._layers))):
                loss, later = self._back(layer, calls[layer], inputs.take(layer), example, targets[layer], later, share)
                losses.append(loss)
        return torch.stack([loss.to(losses[0].device) for loss in reversed(losses)])

    @torch.no_grad()
    def _note(self, example: Example, inputs: "_Waiting") -> list[LayerCall]:
        """The model's forward: each layer's inputs, and how it was called."""
        calls: list[LayerCall] = []

        def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
            hidden, call = LayerCall.of(args, kwargs)
            inputs.put(hidden)
            calls.append(call)

        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in self._layers]
        try:
            self._run(self.model.base_model, example)
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _back(
        self, layer: int, call: LayerCall, hidden: Tensor, example: Example, target: Tensor, later: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One layer's loss, and the gradient [1, T, C] of all losses from here on with respect to its inputs."""
        device = self._devices[layer]
        hidden = hidden.to(device).requires_grad_()
        cache = PivotCache(self.model.config, 1, None, self.rows.cast(self.model.dtype).only(layer), self._devices)
        outputs = call.run(self._layers[layer], hidden, cache, device)
        loss = _loss(outputs, target, example)
        ends, gradients = [loss * share], [torch.ones_like(loss)]
        if later is not None:
            ends, gradients = [*ends, outputs], [*gradients, later.to(device)]
        torch.autograd.backward(ends, gradients)
        assert hidden.grad is not None
        return loss.detach(), hidden.grad

    @contextmanager
    def _losses(self, targets: Targets, example: Example) -> Iterator[list[Tensor]]:
        """While it lasts, each layer's loss is noted as the model runs."""
        found: list[Tensor] = []

        def look(output: Any) -> None:
            found.append(_loss(hidden_of(output), targets[len(found)], example))

        with watched(self._layers, look):
            yield found


def check_recompute(model: PreTrainedModel, recompute: bool) -> None:
    """Raise UnsupportedModelError where gradients cannot be computed layer by layer, which `recompute` asks for."""
    layers, caching = len(decoder_layers(model)[1]), len(cache_devices(model))
    if recompute and caching < layers:
        raise UnsupportedModelError(
            f"{type(model).__name__}: the last {layers - caching} of its {layers} decoder layers attend to what "
            "earlier ones cache, so the gradient of a row is not its own layer's alone: use --no-recompute"
        )


def _loss(outputs: Tensor, target: Tensor, example: Example) -> Tensor:
    return distance(outputs[0][example.counted.to(outputs.device)], target)


def distance(outputs: Tensor, target: Tensor) -> Tensor:
    """Half the mean squared error of outputs [N, C], in fp32 at least."""
    working = torch.promote_types(outputs.dtype, torch.float32)
    return (outputs.to(working) - target.to(outputs.device, working)).square().mean() / 2


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts no parameter of the model wants a gradient."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanting:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_()


class _Waiting:
    """Hidden states of one shape, in a file until they are wanted."""

    def __init__(self, file: Any) -> None:
        self._file, self._like = file, torch.empty(0)

    def put(self, hidden: Tensor) -> None:
        held = hidden.detach().cpu().contiguous()
        self._like = held
        self._file.write(held.view(torch.uint8).numpy().data)

    def take(self, index: int) -> Tensor:
        size = self._like.numel() * self._like.element_size()
        self._file.seek(index * size)
        raw = torch.frombuffer(bytearray(self._file.read(size)), dtype=self._like.dtype)
        return raw.view(self._like.shape)
