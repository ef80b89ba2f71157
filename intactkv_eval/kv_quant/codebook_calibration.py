"""Levels and ranges of `pre_rope` from what a full-precision model computes on samples (KVQuant, section 3.2).

    pass 1: the range of each key channel before RoPE; a histogram of values, each token scaled to [-1, 1]
    pass 2: a histogram of keys, each channel scaled to [-1, 1] by its range
    levels: one-dimensional k-means on each histogram, every number weighing the same

Memory is that of one sample and two histograms a layer, however many samples. Nothing is drawn at random.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.compat.cache_use import CountingCache, run_with_cache
from intactkv_eval.data.hub import digest_of
from intactkv_eval.errors import CheckpointError, ConfigError
from intactkv_eval.kv_quant.codebook import Calibration, Codebook
from intactkv_eval.kv_quant.quantizer import LayerKV
from intactkv_eval.kv_quant.rotary import find_rotary
from intactkv_eval.kv_quant.scheme import working
from intactkv_eval.model.structure import cache_devices, text_config
from intactkv_eval.pivot.identity import Fingerprint

BINS = 2**14
_CELLS = 512
_ROUNDS = 500
Seen = Callable[[Tensor, Tensor, int], None]
"""(keys before RoPE, values) [1, H, T, D] of rows that count, and their layer."""


def calibrate_codebook(
    model: PreTrainedModel,
    samples: Iterable[Tensor],
    bits: int,
    fingerprint: Fingerprint,
    front: tuple[int, ...] = (),
    left_out: int = 0,
    origin: str = "",
) -> Codebook:
    """The codebook of `model` in `bits` bits. samples: token ids [T] each, computed behind the tokens `front`.

    left_out: first rows, of front and sample together, that do not count since a cell exempts them.
    Raises ConfigError for samples that are none, empty or too long, CheckpointError for rows that are not finite.
    """
    texts = [_checked(sample, len(front), left_out, model) for sample in samples]
    if not texts:
        raise ConfigError("KV codebook: no sample to calibrate on")
    layers = len(cache_devices(model))
    low: list[Tensor | None] = [None] * layers
    high: list[Tensor | None] = [None] * layers
    of_values = torch.zeros(layers, BINS, dtype=torch.float64)
    of_keys = torch.zeros(layers, BINS, dtype=torch.float64)

    def first(keys: Tensor, values: Tensor, layer: int) -> None:
        least, most = keys.amin(dim=(0, 2)).cpu(), keys.amax(dim=(0, 2)).cpu()
        if not torch.isfinite(most - least).all():
            raise CheckpointError(
                f"layer {layer}: keys hold NaN or infinite values; load with dtype=bfloat16 or float32"
            )
        known_low, known_high = low[layer], high[layer]
        low[layer] = least if known_low is None else torch.minimum(known_low, least)
        high[layer] = most if known_high is None else torch.maximum(known_high, most)
        ends = values.amin(dim=(1, 3), keepdim=True), values.amax(dim=(1, 3), keepdim=True)
        of_values[layer] += _histogram(values, *ends)

    def second(keys: Tensor, values: Tensor, layer: int) -> None:
        ends = (end[:, None].to(keys.device) for end in (_there(low[layer]), _there(high[layer])))
        of_keys[layer] += _histogram(keys, *ends)

    bar = tqdm(total=2 * len(texts), desc="Calibrating a KV codebook")
    for seen in (first, second):
        _each(model, texts, front, left_out, seen, bar)
    bar.close()
    digest = digest_of(text.numpy() for text in texts)
    return Codebook(
        bits=bits,
        key_levels=torch.stack([k_means(counts, 2**bits) for counts in of_keys]),
        value_levels=torch.stack([k_means(counts, 2**bits) for counts in of_values]),
        low=tuple(_there(end).float() for end in low),
        high=tuple(_there(end).float() for end in high),
        fingerprint=fingerprint,
        calibration=Calibration(front, left_out, digest, len(texts), sum(map(len, texts)), origin),
    )


def k_means(counts: Tensor, levels: int) -> Tensor:
    """Sorted centres [levels] (fp32) of a histogram [N] over [-1, 1], of the least squared error.

    The best split of at most 512 cells of the histogram by dynamic programming, then Lloyd's rounds on the histogram
    itself. Cells are as wide as where centres lie best, by the cube root of the density.
    """
    bins = counts.numel()
    places = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins * 2 - 1
    filled = counts > 0
    if not filled.any():
        return torch.linspace(-1, 1, levels)
    counts, places = counts[filled].double(), places[filled]
    cells = torch.arange(len(places))
    if len(places) > _CELLS:
        dense = counts.pow(1 / 3).cumsum(0)
        cells = (dense / dense[-1] * _CELLS).ceil().long().unique(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    centres = _best_split(counts, places, cells, levels)
    for _ in range(_ROUNDS):
        nearest = torch.bucketize(places, (centres[1:] + centres[:-1]) / 2)
        weights, sums = _sums(nearest, levels, counts), _sums(nearest, levels, counts * places)
        moved = torch.where(weights > 0, sums / weights.clamp(min=1), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres.sort().values.float()


def _best_split(counts: Tensor, places: Tensor, cells: Tensor, levels: int) -> Tensor:
    """Centres [levels] of neighbouring cells put together, the last again where cells are few. cells: of each place."""
    found = int(cells[-1]) + 1
    weight, sums, squares = (
        torch.cat([torch.zeros(1, dtype=torch.float64), _sums(cells, found, counts * places**power).cumsum(0)])
        for power in (0, 1, 2)
    )
    total = weight[None] - weight[:, None]  # of cells [row, column)
    cost = squares[None] - squares[:, None] - (sums[None] - sums[:, None]).square() / total.clamp(min=1)
    cost = torch.where(total > 0, cost.clamp(min=0), torch.inf)
    best, splits = cost[0], []
    for _ in range(min(levels, found) - 1):
        best, split = (best[:, None] + cost).min(dim=0)
        splits.append(split)
    edges = [found]
    for split in reversed(splits):
        edges.append(int(split[edges[-1]]))
    edges = [0, *reversed(edges)]
    centres = [(sums[end] - sums[start]) / (weight[end] - weight[start]) for start, end in pairwise(edges)]
    return torch.stack(centres + centres[-1:] * (levels - len(centres)))


def _sums(of: Tensor, size: int, numbers: Tensor) -> Tensor:
    return torch.zeros(size, dtype=torch.float64).index_add_(0, of, numbers)


class _Watched(CountingCache):
    """Shows every row that is written."""

    def __init__(self, seen: Callable[[Tensor, Tensor, int], None]) -> None:
        super().__init__()
        self._seen = seen

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> LayerKV:
        self._seen(key_states, value_states, layer_idx)
        return super().store(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def _each(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    front: tuple[int, ...],
    left_out: int,
    seen: Seen,
    bar: Any,
) -> None:
    """Every row of every text that counts, layer by layer."""
    rotary = find_rotary(model)
    device = model.get_input_embeddings().weight.device

    def undone(keys: Tensor, values: Tensor, layer: int) -> None:
        positions = torch.arange(keys.shape[2])[None]
        plain = rotary.at(positions, layer, keys).undo(working(keys))
        seen(plain[:, :, left_out:], working(values)[:, :, left_out:], layer)

    for text in texts:
        ids = torch.cat([torch.tensor(front, dtype=torch.long), text])[None].to(device)
        run_with_cache(model, _Watched(undone), ids)
        bar.update()


def _histogram(rows: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Counts [BINS] of `rows`, scaled to [-1, 1] by their ranges; a range of nothing tells nothing."""
    spread = high - low
    scaled = (2 * (rows - low) / spread - 1)[(spread > 0).expand_as(rows)]
    return torch.histc(scaled, BINS, -1, 1).double().cpu()


def _checked(sample: Tensor, front: int, left_out: int, model: PreTrainedModel) -> Tensor:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    whole = front + sample.numel()
    if sample.ndim != 1 or sample.is_floating_point() or whole <= left_out or (limit is not None and whole > limit):
        raise ConfigError(
            f"KV codebook: a sample {tuple(sample.shape)} {sample.dtype}; expected token ids [T], more than "
            f"{max(left_out - front, 0)} and with {front} tokens in front at most {limit}"
        )
    return sample.detach().cpu().long()


def _there(end: Tensor | None) -> Tensor:
    if end is None:
        raise CheckpointError("KV codebook: the model fills no KV cache in one of its layers")
    return end
