"""A checkpoint's tensors by the names that they have in a model: renamed as transformers renames them when it loads.

Checkpoints of other releases call modules otherwise (`language_model.model.layers` of Gemma 3's wrapper, Pythia's
`embed_out`), and leave the base model's prefix out, or add it. Knows no format: which tensors are packed is told.
"""

from collections.abc import Collection, Iterable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import renamed_on_loading
from intactkv_eval.weights.checkpoint import TensorSource


class NamedCheckpoint:
    """The tensors of a checkpoint by their names in `model`; those that have no place in it by their own.

    Args:
        checkpoint: The files, or the tensors of a loaded model.
        model: The model that they are read into; it may be on meta.
        packed: The last words of the names of what stands for a `weight`: qweight, scales, ...
    """

    def __init__(self, checkpoint: TensorSource, model: PreTrainedModel, packed: Collection[str] = ()) -> None:
        self.checkpoint = checkpoint
        self._stored: dict[str, str] = {}
        self.converted: list[str] = []
        """As stored, the tensors that transformers converts when it loads them: they have no place of their own."""
        self.placeless: list[str] = []
        """As stored, the other tensors that have no place."""
        places = _TensorPlaces(model)
        for stored in sorted(checkpoint.names):
            stem, _, key = stored.rpartition(".")
            name, converted = places.of(f"{stem}.weight" if key in packed else stored)
            if name is not None and key in packed:
                name = f"{name.rpartition('.')[0]}.{key}"
            if name is None:
                (self.converted if converted else self.placeless).append(stored)
            # Two tensors of one name: the second stays without a place.
            self._stored[stored if name is None or name in self._stored else name] = stored

    @property
    def folder(self) -> Path | str:
        """Of the checkpoint; the name of a loaded model."""
        return self.checkpoint.folder

    @property
    def names(self) -> frozenset[str]:
        """Of every tensor."""
        return frozenset(self._stored)

    def stored_as(self, name: str) -> str:
        """What the checkpoint calls the tensor `name`."""
        return self._stored[name]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of these names, on the CPU, with storage of their own."""
        stored = {name: self._stored[name] for name in names}
        found = self.checkpoint.read(stored.values())
        return {name: found[key] for name, key in stored.items()}


class _TensorPlaces:
    """Where a model has a place for a tensor of a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._prefix = f"{model.base_model_prefix}."
        self._tensors = set(model.state_dict())
        self._modules = {name for name, _ in model.named_modules()}
        self._renamed = renamed_on_loading(model)

    def of(self, stored: str) -> tuple[str | None, bool]:
        """The name in the model, None where there is no place; and whether it would have to be converted.

        A name that transformers would change stays as it is where only the unchanged one has a place. A module that
        has no such tensor counts as the place: biases of zeros are written for layers without one.
        """
        renamed, converted = self._renamed(stored)
        own = self._variants(stored)
        asked = own if converted else [*self._variants(renamed), *own]
        name = next((one for one in asked if one in self._tensors), None)
        if name is None and not converted:
            name = next((one for one in asked if one.rpartition(".")[0] in self._modules), None)
        return name, converted and name is None

    def _variants(self, name: str) -> list[str]:
        return [name, self._prefix + name, name.removeprefix(self._prefix)]
