"""The numbers behind the figures of one cell: outliers, attention, what each intact row gives back, the KV cache.

    magnitudes [L, T], surface [T, C], attention [N, T, T]     the full-precision model on the pivot and a text
    loss_last, loss_all, nats [P + 1, S]                       0, 1, ... P of the pivot's rows intact, on S texts
    keys, values [2, T, H*D]                                   of one layer, before and after the KV quantizer

They are saved as they are, so that a figure can be drawn again, otherwise, without a model. Draws nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.calibrate.layer_calls import hidden_of
from intactkv_eval.calibrate.rows import Rows, run_behind
from intactkv_eval.harness.pivoted import PivotedModel
from intactkv_eval.model.structure import decoder_layers, layer_devices
from intactkv_eval.pivot.discover import eager_attention, observe
from intactkv_eval.pivot.kv import PivotKV

Array = NDArray[Any]
SHOWN = 48  # tokens in pictures of single tokens


class Outputs(NamedTuple):
    """Of the tokens that are judged: each layer's outputs [N, C], and the logits [N, V] behind each."""

    layers: list[Tensor]
    logits: Tensor


def outliers(model: PreTrainedModel, ids: Sequence[int], layer: int | None) -> dict[str, Array]:
    """Magnitudes of layer outputs by layer and token; by token and channel in one layer, the most uneven if None."""
    layers = list(decoder_layers(model)[1])
    seen = observe(model, layers, ids, attention=False)
    chosen = int(seen.ratios.amax(dim=1).argmax()) if layer is None else layer
    with _noted(layers[chosen : chosen + 1]) as outputs, torch.no_grad():
        model.base_model(input_ids=_row(model, ids), use_cache=False)
    surface = outputs[0][0].abs().float().cpu().numpy()
    return {"magnitudes": seen.magnitudes.numpy(), "surface": surface, "surface_layer": np.array(chosen)}


def attention_maps(model: PreTrainedModel, ids: Sequence[int], layers: Sequence[int], head: int | None) -> Array:
    """[N, T, T] of the chosen layers: one head's, or the mean of all."""
    chosen = [decoder_layers(model)[1][index] for index in layers]
    found: list[Array] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor) and output[1].ndim == 4:
            weights = output[1][0].float()
            found.append((weights.mean(dim=0) if head is None else weights[head]).cpu().numpy())

    parts = (part for layer in chosen for part in layer.modules() if "Attention" in type(part).__name__)
    hooks = [part.register_forward_hook(note) for part in parts]
    try:
        with eager_attention(model), torch.no_grad():
            model.base_model(input_ids=_row(model, ids), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack(found)


def expected_outputs(model: PreTrainedModel, pivot: PivotKV, texts: Sequence[Tensor]) -> list[Outputs]:
    """What the full-precision model makes of each text behind the pivot."""
    return [_behind(model, pivot, len(pivot), text) for text in texts]


def by_intact_rows(
    model: PreTrainedModel, pivot: PivotKV, texts: Sequence[Tensor], expected: Sequence[Outputs]
) -> dict[str, Array]:
    """Loss and nats of the quantized `model` with 0, 1, ... P rows of the pivot intact and the others computed."""
    sizes = range(len(pivot) + 1)
    last, whole, nats = (np.zeros((len(sizes), len(texts))) for _ in range(3))
    for size in tqdm(sizes, desc="Sizes of the pivot"):
        for place, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
            found = _behind(model, pivot, size, text)
            losses = [
                float((one.float() - other.float()).square().mean() / 2)
                for one, other in zip(found.layers, wanted.layers, strict=True)
            ]
            last[size, place], whole[size, place] = losses[-1], sum(losses)
            nats[size, place] = _nats(found.logits, text)
    full = np.array([_nats(one.logits, text) for one, text in zip(expected, texts, strict=True)])
    return {"loss_last": last, "loss_all": whole, "nats": nats, "nats_full": full}


def cache_rows(pivoted: PivotedModel, ids: Sequence[int], layer: int) -> dict[str, Array]:
    """Keys and values [2, T, H*D] of one layer for tokens behind the pivot: as computed, and as they are stored."""
    assert pivoted.writer is not None, "the cell's KV cache is not quantized"
    exact = PivotedModel(pivoted.model, pivoted.token_ids, pivoted.pivot)
    cache = exact.new_cache(1)
    taken = () if pivoted.pivot is not None else pivoted.token_ids
    with torch.no_grad():
        row = _row(pivoted.model, [*taken, *ids])
        pivoted.model.base_model(input_ids=row, past_key_values=cache, use_cache=True)
    held: Any = cache.layers[layer]
    keys, values = held.keys, held.values
    positions = torch.arange(keys.shape[2], device=keys.device)[None]
    stored = pivoted.writer.write(keys, values, layer, positions)
    kept = pivoted.exempt
    pairs = {"keys": (keys, stored[0]), "values": (values, stored[1])}
    made = {}
    for name, (before, after) in pairs.items():
        held_rows = torch.cat([before[:, :, :kept], after[:, :, kept:]], dim=2)
        made[name] = np.stack([_flat(before), _flat(held_rows)])
    return made


def _behind(model: PreTrainedModel, pivot: PivotKV, intact: int, text: Tensor) -> Outputs:
    """The model on `text` [T] behind the pivot's tokens, the first `intact` of which are the captured rows."""
    layers = list(decoder_layers(model)[1])
    rows = Rows(*(tuple(part[:, :intact] for part in kind) for kind in (pivot.keys, pivot.values)))
    body = torch.cat([torch.tensor(pivot.token_ids[intact:], dtype=torch.long), text])
    with _noted(layers) as outputs, torch.no_grad():
        logits = run_behind(model, model, rows, layer_devices(model), body).logits[0]
    start = len(body) - len(text)
    return Outputs([one[0, start:] for one in outputs], logits[start:])


def _nats(logits: Tensor, text: Tensor) -> float:
    scores = logits[:-1].float().log_softmax(dim=-1).gather(1, text[1:, None].to(logits.device))
    return -float(scores.double().mean())


def _flat(rows: Tensor) -> Array:
    """[1, H, T, D] -> [T, H*D]."""
    made: Array = rows[0].transpose(0, 1).flatten(1).float().cpu().numpy()
    return made


def _row(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)


@contextmanager
def _noted(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While it lasts the outputs [1, T, C] of `layers` are noted, in order."""
    found: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _m, _a, output: found.append(hidden_of(output))) for layer in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
