"""What `intactkv quantize` does: a full-precision model in, a quantized checkpoint out."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from intactkv_eval import __version__
from intactkv_eval.config import WeightSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.harness.quantization import read_quantization
from intactkv_eval.model.load import quantized_matrix
from intactkv_eval.model.structure import linear_layers
from intactkv_eval.model.whole import WholeCheckpoint
from intactkv_eval.quantize.export import check_new, export
from intactkv_eval.quantize.rtn import quantize_rtn
from intactkv_eval.weights.formats import FORMATS
from intactkv_eval.weights.formats.scheme import Scheme
from intactkv_eval.weights.quantized import QuantizedWeight


def quantize_to_folder(
    pretrained: str, out: Path, layout: str, weights: WeightSpec, dtype: str, revision: str, trust_remote_code: bool
) -> int:
    """Quantize every linear layer of the decoder layers by RTN and write the checkpoint; the number of those layers.

    Raises ConfigError or CheckpointError before anything is written.
    """
    if layout not in FORMATS:
        raise ConfigError(f"--format {layout}: use one of {', '.join(FORMATS)}")
    if weights.bits is None or weights.group_size is None:
        raise ConfigError("quantize needs --bits and --group-size")
    check_new(out)
    model, tokenizer = _load(pretrained, dtype, revision, trust_remote_code)
    bits, size, symmetric = weights.bits, weights.group_size, weights.symmetric

    def rtn(matrix: Tensor, name: str) -> QuantizedWeight:
        return quantize_rtn(matrix, bits, size, symmetric, name, torch.float16)  # as all three formats hold scales

    found = tqdm(linear_layers(model).items(), desc="Quantizing")
    layers = {name: quantized_matrix(layer, name, rtn) for name, layer in found}
    kept = tuple(n for n, module in model.named_modules() if isinstance(module, torch.nn.Linear) and n not in layers)
    scheme = Scheme(bits, size, symmetric, f"intactkv_eval:{__version__} rtn", kept)
    packed = {f"{name}.weight" for name in layers}
    state = model.state_dict()
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    others = {name: tensor.contiguous() for name, tensor in state.items() if name not in packed | tied}
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as beside:
        tokenizer.save_pretrained(beside)
        model.generation_config.save_pretrained(beside)
        export(out, layout, scheme, model.config.to_diff_dict(), layers, others, Path(beside))
    return len(layers)


def _load(pretrained: str, dtype: str, revision: str, trust_remote_code: bool) -> tuple[PreTrainedModel, Any]:
    if dtype not in {"auto", "float32", "bfloat16", "float16"}:
        raise ConfigError(f"--dtype {dtype}: use auto, float32, bfloat16 or float16")
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(pretrained, **options)
        if read_quantization(pretrained, config).summary is not None:
            raise ConfigError(f"{pretrained} is quantized already: name the full-precision model")
        tokenizer = AutoTokenizer.from_pretrained(pretrained, **options)
        model: PreTrainedModel = WholeCheckpoint(AutoModelForCausalLM).from_pretrained(
            pretrained, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{pretrained!r} cannot be loaded: {error}") from error
    return model, tokenizer
