"""Quantizing a loaded model's weights when it is loaded: round to nearest, with llm-awq's clips where there are any."""

from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.cell.spec import WeightSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.model.loading import quantized_model
from intactkv_eval.quantize.awq_search import AWQSearch, clipped
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.input_transform import InputTransform
from intactkv_eval.weights.quantized import QuantizedWeight


def quantize_model(
    model: PreTrainedModel,
    weights: WeightSpec,
    backend: str = "auto",
    search: AWQSearch | None = None,
    stages: Mapping[str, InputTransform] | None = None,
) -> PreTrainedModel:
    """Quantize the linear layers of a model's decoder.

    Args:
        model: The full-precision model, which is unchanged.
        weights: How they are quantized.
        backend: The kernels of the quantized layers.
        search: Whose clips are applied first; its scales must be in `model` already.
        stages: Transforms of the layers' inputs, by name.

    Returns:
        A model with quantized layers.

    Raises:
        ConfigError: For weights without bits or a group size.
    """
    if weights.bits is None or weights.group_size is None:
        raise ConfigError("quantized weights need bits and group_size")
    bits, size, clips = weights.bits, weights.group_size, search.clips if search else {}

    def quantizer(matrix: Tensor, name: str) -> QuantizedWeight:
        return quantize_rtn(clipped(matrix, clips.get(name)), bits, size, weights.symmetric_formula, name)

    return quantized_model(model, quantizer, backend, stages)
