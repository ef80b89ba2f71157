"""The numbers behind the figures of one cell: outliers, attention, what each intact row gives back, the KV cache.

    magnitudes [L, T], surface [T, C], attention [N, T, T]     the full-precision model on the pivot and a text
    loss_last, loss_all, nll [P + 1, S]                       0, 1, ... P of the pivot's rows intact, on S texts
    keys, values [2, T, H*D]                                   of one layer, before and after the KV quantizer

They are saved as they are, so that a figure can be drawn again, otherwise, without a model. Draws nothing.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import run_with_cache
from intactkv_eval.compat.transformers_api import cache_argument
from intactkv_eval.inference.pivoted_model import PivotedModel
from intactkv_eval.kv_quant.quantizer import KVQuantizer
from intactkv_eval.model.hooks import attention_watched, hidden_of, watched
from intactkv_eval.model.structure import cache_devices, decoder_layers
from intactkv_eval.pivot.discover import observe
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.pivot.prefix_choice import nll_of
from intactkv_eval.training.student import distance
from intactkv_eval.training.trainable_kv import Rows, run_behind

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
    outputs: list[Any] = []
    with watched([layers[chosen]], outputs.append), torch.no_grad():
        model.base_model(input_ids=_row(model, ids), **cache_argument(model.base_model, None))
    surface = hidden_of(outputs[0])[0].abs().float().cpu().numpy()
    return {"magnitudes": seen.magnitudes.numpy(), "surface": surface, "surface_layer": np.array(chosen)}


def attention_maps(model: PreTrainedModel, ids: Sequence[int], layers: Sequence[int], head: int | None) -> Array:
    """[N, T, T] of the chosen layers, in the order in which they run: one head's, or the mean of all."""
    chosen = [decoder_layers(model)[1][index] for index in layers]
    found: list[Array] = []

    def note(weights: Tensor) -> None:
        found.append((weights.mean(dim=0) if head is None else weights[head]).float().cpu().numpy())

    with attention_watched(model, chosen, note), torch.no_grad():
        model.base_model(input_ids=_row(model, ids), **cache_argument(model.base_model, None))
    return np.stack(found)


def expected_outputs(model: PreTrainedModel, pivot: PivotKV, texts: Sequence[Tensor]) -> list[Outputs]:
    """What the full-precision model makes of each text behind the pivot."""
    return [_behind(model, pivot, len(pivot), text) for text in texts]


def by_intact_rows(
    model: PreTrainedModel,
    pivot: PivotKV,
    texts: Sequence[Tensor],
    expected: Sequence[Outputs],
    writer: KVQuantizer | None = None,
) -> dict[str, Array]:
    """Loss and nll of the quantized `model` with 0, 1, ... P rows of the pivot intact and the others computed.

    writer: what quantizes the KV cache, but for the intact rows; none that quantizes in groups.
    """
    sizes = range(len(pivot) + 1)
    last, whole, nll = (np.zeros((len(sizes), len(texts))) for _ in range(3))
    for size in tqdm(sizes, desc="Sizes of the pivot"):
        for place, (text, wanted) in enumerate(zip(texts, expected, strict=True)):
            found = _behind(model, pivot, size, text, writer)
            losses = [float(distance(*pair)) for pair in zip(found.layers, wanted.layers, strict=True)]
            last[size, place], whole[size, place] = losses[-1], sum(losses)
            nll[size, place] = _nll(found.logits, text)
    full = np.array([_nll(one.logits, text) for one, text in zip(expected, texts, strict=True)])
    return {"loss_last": last, "loss_all": whole, "nll": nll, "nll_full": full}


def cache_rows(pivoted: PivotedModel, ids: Sequence[int], layer: int) -> dict[str, Array]:
    """Keys and values [2, T, H*D] of one layer for tokens behind the pivot: as computed, and as they are stored."""
    assert pivoted.kv_quantizer is not None, "the cell's KV cache is not quantized"
    exact = PivotedModel(pivoted.model, pivoted.token_ids, pivoted.pivot)
    cache = exact.new_cache(1)
    taken = () if pivoted.pivot is not None else pivoted.token_ids
    with torch.no_grad():
        row = _row(pivoted.model, [*taken, *ids])
        run_with_cache(pivoted.model.base_model, cache, row)
    held: Any = cache.layers[layer]
    keys, values = held.keys, held.values
    positions = torch.arange(keys.shape[2], device=keys.device)[None]
    stored = pivoted.kv_quantizer.write(keys, values, layer, positions)
    kept = pivoted.exempt
    pairs = {"keys": (keys, stored[0]), "values": (values, stored[1])}
    made = {}
    for name, (before, after) in pairs.items():
        held_rows = torch.cat([before[:, :, :kept], after[:, :, kept:]], dim=2)
        made[name] = np.stack([_flat(before), _flat(held_rows)])
    return made


def _behind(
    model: PreTrainedModel, pivot: PivotKV, intact: int, text: Tensor, writer: KVQuantizer | None = None
) -> Outputs:
    """The model on `text` [T] behind the pivot's tokens, the first `intact` of which are the captured rows."""
    outputs: list[Any] = []
    rows = Rows(*(tuple(part[:, :intact] for part in kind) for kind in (pivot.keys, pivot.values)))
    body = torch.cat([torch.tensor(pivot.token_ids[intact:], dtype=torch.long), text])
    with watched(decoder_layers(model)[1], outputs.append), torch.no_grad():
        logits = run_behind(model, model, rows, cache_devices(model), body, writer).logits[0]
    start = len(body) - len(text)
    return Outputs([hidden_of(one)[0, start:] for one in outputs], logits[start:])


def _nll(logits: Tensor, text: Tensor) -> float:
    return float(nll_of(logits[:-1], text[1:]).mean())


def _flat(rows: Tensor) -> Array:
    """[1, H, T, D] -> [T, H*D]."""
    made: Array = rows[0].transpose(0, 1).flatten(1).float().cpu().numpy()
    return made


def _row(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)], device=model.get_input_embeddings().weight.device)
