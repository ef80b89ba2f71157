"""What the full-precision model makes of the examples: each layer's outputs of the counted tokens.

Computed once and kept in files, a file an example, where the budget allows; else computed again whenever they are
wanted, with the full-precision model in memory beside the quantized one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from intactkv_eval.errors import UnsupportedModelError
from intactkv_eval.model.hooks import hidden_of, watched
from intactkv_eval.model.structure import cache_devices, decoder_layers, text_config
from intactkv_eval.pivot.kv import PivotKV
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.tensor_file import save_tensors
from intactkv_eval.training.examples import Example, counted_nll
from intactkv_eval.training.trainable_kv import Rows, run_behind


@torch.no_grad()
def layer_outputs(model: PreTrainedModel, pivot: PivotKV, example: Example) -> list[Tensor]:
    """Each layer's outputs [N, C] of the counted tokens, behind the pivot.

    Raises UnsupportedModelError where a layer hands on several hidden states of a token.
    """
    found: list[Tensor] = []

    def look(output: Any) -> None:
        if hidden_of(output).ndim != 3:
            raise UnsupportedModelError(
                f"{type(model).__name__}: its decoder layers hand on {tuple(hidden_of(output).shape)}, several hidden "
                "states of a token, and calibration compares one; use the pivot as it is captured"
            )
        hidden = hidden_of(output)[0]
        found.append(hidden[example.counted.to(hidden.device)])

    with watched(decoder_layers(model)[1], look):
        run_behind(model.base_model, model, Rows(pivot.keys, pivot.values), cache_devices(model), example.body)
    return found


@torch.no_grad()
def full_nll(model: PreTrainedModel, pivot: PivotKV, examples: Sequence[Example]) -> float:
    """Of the counted tokens of all examples, each: what a quantized model may come to."""
    rows, devices = Rows(pivot.keys, pivot.values), cache_devices(model)
    runs = (run_behind(model, model, rows, devices, one.body).logits[0] for one in examples)
    nll = torch.cat([counted_nll(logits, one) for logits, one in zip(runs, examples, strict=True)])
    return float(nll.sum()) / max(len(nll), 1)


def bytes_of(model: PreTrainedModel, examples: Sequence[Example]) -> int:
    """What all layer outputs of `examples` take."""
    config: Any = text_config(model)
    tokens = sum(int(example.counted.sum()) for example in examples)
    return tokens * int(config.num_hidden_layers) * int(config.hidden_size) * int(model.dtype.itemsize)


class _OnDisk(Sequence[Tensor]):
    """The layers of a file, each read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")
        self._count = len(list(self._file.keys()))  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, layer: Any) -> Any:
        place = range(self._count)[layer]
        return self._file.get_tensor(str(place)) if isinstance(place, int) else [self[one] for one in place]


class KeptTargets:
    """Layer outputs in files of `folder`, by the place of their example."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fill(self, model: PreTrainedModel, pivot: PivotKV, examples: Sequence[Example], shown: bool = True) -> None:
        """Compute and keep what is not there yet."""
        missing = [place for place in range(len(examples)) if not self._path(place).is_file()]
        for place in tqdm(missing, desc="Full-precision outputs", disable=not shown or not missing):
            outputs = {str(i): one.cpu() for i, one in enumerate(layer_outputs(model, pivot, examples[place]))}
            write_atomic(self._path(place), lambda partial, kept=outputs: save_tensors(partial, kept))  # type: ignore[misc]

    def __call__(self, place: int) -> Sequence[Tensor]:
        """Of the example at `place`."""
        return _OnDisk(self._path(place))

    def _path(self, place: int) -> Path:
        return self._folder / f"example-{place:05d}.safetensors"
