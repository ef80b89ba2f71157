"""The model that answers: rotated, quantized, with activation quantization, as the cell says."""

from transformers import PreTrainedModel

from intactkv_eval.assemble.loaded_model import LoadedModel, own_copy
from intactkv_eval.assemble.model_cache import ModelCache
from intactkv_eval.cell.spec import CellSpec
from intactkv_eval.model.input_transforms import apply_input_transforms, input_transforms
from intactkv_eval.model.linear import quantized_layers
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.quantize.on_the_fly import quantize_model
from intactkv_eval.quantize.rotation import rotate


def evaluated_model(cell: CellSpec, loaded: LoadedModel, models: ModelCache | None = None) -> PreTrainedModel:
    """The model of a cell, once for all cells that have it in common where `models` holds what was loaded."""
    if models is None:
        return _evaluated(cell, loaded, None)
    if quantized_layers(loaded.model) and cell.activations.bits < 16:
        models.clear()  # input transforms are put into the packed model itself
    key = cell.weights, cell.activations, cell.backend
    return models.get_or_derive(loaded.model, key, lambda: _evaluated(cell, loaded, models))


def _evaluated(cell: CellSpec, loaded: LoadedModel, models: ModelCache | None) -> PreTrainedModel:
    """Packed layers stay as they are."""
    model = loaded.model
    if quantized_layers(model):
        if cell.activations.bits < 16:
            apply_input_transforms(model, None, cell.activations)
        return model
    rotation = None
    if cell.weights.rotate:
        model = own_copy(model, cell, models)
        rotation = rotate(model)
    if cell.weights.method == "none" and cell.activations.bits == 16 and rotation is None:
        return model
    stages = input_transforms(list(linear_layers(model)), rotation, cell.activations)
    if cell.weights.method == "none":
        return quantized_model(model, None, stages=stages)
    return quantize_model(model, cell.weights, cell.backend, loaded.search, stages)
