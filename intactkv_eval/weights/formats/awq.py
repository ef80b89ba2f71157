"""AWQ checkpoints (AutoAWQ, GPTQModel): qweight, qzeros, scales; 4 bits, two layouts.

    gemm    qweight [I, O/8]  eight codes of a row a word, in the order 0 2 4 6 1 3 5 7;  qzeros [G, O/8] likewise;
            scales [G, O].  GPTQModel's other widths are dense bit streams along the row, in order.
    gemv    qweight [O, I/8]  eight codes a word, in order;  qzeros [O, Z] eight zeros a word, in order, Z the words of
            the groups rounded up to the kernel's width;  scales [O, 8*Z]
    w[o, i] = (code - zero[g]) * scale[g],  g = i // group_size

The scales that AWQ's search found are folded into the norms and layers before: nothing of them is in these tensors.
Source: AutoAWQ 0.2.9 (WQLinear_GEMM, WQLinear_GEMV, packing_utils); GPTQModel 7.7 (quantization/awq/utils).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.formats.bitstream import pack_stream, unpack_stream
from intactkv_eval.weights.formats.format import Format
from intactkv_eval.weights.formats.layer import LayerTensors, check_config_bits
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.formats.settings import AWQSettings, check_settings
from intactkv_eval.weights.formats.spellings import one_of, whole_number, word
from intactkv_eval.weights.quantized import QuantizedWeight

NAME = "awq"
_LAYOUTS = {"gemm", "gemv", "gemv_fast", "llm_awq"}
TENSORS = ("qweight", "qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight outputs lies in each nibble of a gemm word, lowest first
BITS = 4


def describe(scheme: CheckpointScheme) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that `encode` wrote: layout gemm."""
    return {
        "quant_method": NAME,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": list(scheme.kept),
        "meta": scheme.meta,
    }


def encode(weight: QuantizedWeight, scheme: CheckpointScheme) -> dict[str, Tensor]:
    """The tensors of one layer in layout gemm. Raises CheckpointError where the format cannot hold it."""
    if weight.bits != BITS or weight.order is not None:
        raise CheckpointError("AWQ holds weights of 4 bits without act-order: use --format gptq")
    if weight.out_features % 8 or weight.in_features % weight.group_size:
        raise CheckpointError(f"AWQ: {weight.out_features} outputs and groups of {weight.group_size} do not fit it")
    return {
        "qweight": to_gemm_words(weight.unpacked().t().contiguous()),
        "qzeros": to_gemm_words(weight.zeros.t().contiguous()),
        "scales": weight.scales.t().contiguous().to(torch.float16),
    }


def read_config(config: Mapping[str, Any]) -> "AWQFormat":
    """The format that a checkpoint's config describes, in whatever spelling.

    Raises CheckpointError for a config that it cannot be, and for two spellings that contradict each other.
    """
    said = {str(key).lower(): value for key, value in config.items()}
    if word(said.get("backend")) == "llm_awq":
        raise CheckpointError(
            "quantization_config: backend is llm-awq, whose layout is not read; read natively are AutoAWQ's and "
            "GPTQModel's gemm and gemv"
        )
    others: tuple[str, ...] = ("checkpoint_format", "format")
    if said.get("version") is not None:  # beside which a GPTQ layout may have been left
        others = tuple(key for key in others if word(said.get(key)) in _LAYOUTS)
    named = {
        "bits": one_of(said, ("bits", "w_bit"), whole_number),
        "group_size": one_of(said, ("group_size", "q_group_size"), whole_number),
        "version": one_of(said, ("version", *others), word),
    }
    aliases = ("w_bit", "q_group_size", "checkpoint_format", "format")
    rest = {key: value for key, value in said.items() if key not in {*aliases, *named}}
    return AWQFormat({**rest, **{key: value for key, value in named.items() if value is not None}})


@dataclass(frozen=True)
class AWQFormat(Format):
    """The format as a checkpoint's config describes it, its spelling settled (`read_config`).

    Raises CheckpointError for a config that it cannot be.
    """

    config: Mapping[str, Any]
    tensors: tuple[str, ...] = TENSORS
    main: str = "qweight"

    def __post_init__(self) -> None:
        check_settings(AWQSettings, self.config)
        check_config_bits(self._bits(), "quantization_config")
        if self._layout() not in {"gemm", "gemv"}:
            raise CheckpointError(
                f"quantization_config: AWQ version {self._layout()!r}; read natively are gemm and gemv"
            )

    def summary(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "method": NAME,
            "bits": self._bits(),
            "group_size": self._group_size(),
            "symmetric": not self.config.get("zero_point", True),
            "act_order": False,
            "mixed": False,
        }

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The layer's weight, exactly. Raises CheckpointError where a tensor is not what the config says."""
        inputs, size = layer.in_features, self._group_size()
        size = inputs if size == -1 else size
        if size < 1 or inputs % size:
            raise CheckpointError(f"{layer.name}: group_size {size} does not divide its {inputs} in_features")
        bits = check_config_bits(self._bits(), "quantization_config")
        parts = _read_gemm if self._layout() == "gemm" else _read_gemv
        codes, scales, zeros = parts(layer, size, bits)
        return QuantizedWeight.from_codes(codes, scales, zeros, bits, size)

    def _bits(self) -> object:
        return self.config.get("bits")

    def _group_size(self) -> int:
        return int(self.config.get("group_size", 128))

    def _layout(self) -> str:
        return str(self.config.get("version", "gemm"))


def _read_gemm(layer: LayerTensors, size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    inputs, outputs, groups = layer.in_features, layer.out_features, layer.in_features // size
    if bits == BITS:
        _whole_words(layer, outputs, "out")
    width = -(-outputs * bits // 32)
    codes, zeros = (
        from_gemm_words(words) if bits == BITS else unpack_stream(words, bits, outputs)
        for words in (layer.words("qweight", (inputs, width)), layer.words("qzeros", (groups, width)))
    )
    return codes.t().contiguous(), layer.scales("scales", (groups, outputs)).t(), zeros.t()


def _read_gemv(layer: LayerTensors, size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    if bits != BITS:
        raise CheckpointError(f"{layer.name}: layout gemv of {bits} bits; it knows {BITS} only")
    inputs, outputs, groups = layer.in_features, layer.out_features, layer.in_features // size
    _whole_words(layer, inputs, "in")
    codes = unpack_stream(layer.words("qweight", (outputs, inputs // 8)), BITS, inputs)
    words = gemv_zero_words(inputs, size)
    zeros = unpack_stream(layer.words("qzeros", (outputs, words)), BITS, groups)
    return codes, layer.scales("scales", (outputs, words * 8))[:, :groups], zeros


def _whole_words(layer: LayerTensors, width: int, along: str) -> None:
    if width % 8:
        raise CheckpointError(f"{layer.name}: {width} {along}_features are no multiple of 8, as AWQ's words need")


def gemv_zero_words(inputs: int, group_size: int) -> int:
    """Words of zeros in a gemv row: the groups' words, rounded up to what a warp of the kernel reads at once."""
    multiple = {128: 1, 64: 2, 32: 4}.get(group_size, 1)
    words = -(-(inputs // group_size) // 8)
    return -(-words // multiple) * multiple


def from_gemm_words(words: Tensor) -> Tensor:
    """Words [R, C/8] (int32) -> values [R, C] (uint8)."""
    plain = unpack_stream(words, BITS, words.shape[1] * 8).view(words.shape[0], -1, 8)
    values = torch.empty_like(plain)
    values[:, :, list(ORDER)] = plain
    return values.view(words.shape[0], -1)


def to_gemm_words(values: Tensor) -> Tensor:
    """Values [R, C] (below 16) -> words [R, C/8] (int32)."""
    eights = values.view(values.shape[0], -1, 8)[:, :, list(ORDER)]
    return pack_stream(eights.reshape(values.shape), BITS)
