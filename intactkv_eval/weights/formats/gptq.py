"""GPTQ checkpoints (AutoGPTQ, GPTQModel, optimum): qweight, qzeros, scales, g_idx.

    qweight [ceil(I*b/32), O]  codes, a dense bit stream down each column    scales [G, O]
    qzeros  [G, ceil(O*b/32)]  zeros, a dense bit stream along each row      g_idx  [I]  the group of each input
    w[o, i] = (code[i, o] - zero[g_idx[i], o]) * scale[g_idx[i], o]

Format `gptq_v2` stores the zeros as they are. Format `gptq` (v1) stores them minus one, and what a zero of 0 becomes
then depends on the writer: see `_zeros`. Source: the packing and reading code of AutoGPTQ 0.7.1 and GPTQModel 7.7.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.formats.bitstream import pack_stream, unpack_stream
from intactkv_eval.weights.formats.format import Format
from intactkv_eval.weights.formats.layer import LayerTensors, check_config_bits, in_group_order
from intactkv_eval.weights.formats.patterns import matches
from intactkv_eval.weights.formats.scheme import CheckpointScheme
from intactkv_eval.weights.formats.settings import GPTQSettings, check_settings
from intactkv_eval.weights.formats.spellings import group_order, one_of, whole_number, word
from intactkv_eval.weights.quantized import QuantizedWeight

NAME = "gptq"
TENSORS = ("qweight", "qzeros", "scales", "g_idx")
_ACT_ORDER = ("desc_act", "act_order", "act-order", "actorder")  # the first is the one that libraries read
_ALIASES = ("format", "w_bit", "wbits", "q_group_size", "groupsize", "symmetric", *_ACT_ORDER)


def write(weight: QuantizedWeight, less_one: bool) -> dict[str, Tensor]:
    """The tensors of one layer: format `gptq` (v1) with `less_one`, else `gptq_v2`. Scales keep their dtype.

    Raises CheckpointError where the format cannot hold the layer.
    """
    inputs, outputs, bits = weight.in_features, weight.out_features, weight.bits
    if inputs * bits % 32 or outputs * bits % 32:
        raise CheckpointError(f"GPTQ: {outputs} x {inputs} codes of {bits} bits do not fill 32-bit words")
    zeros = weight.zeros.to(torch.int16) - int(less_one)
    if int(zeros.min()) < 0 or int(zeros.max()) > 2**bits - 1:
        raise CheckpointError("GPTQ: a zero is outside of what the format's version holds")
    codes, index = weight.unpacked(), torch.arange(inputs, device=weight.codes.device) // weight.group_size
    if weight.order is not None:
        back = torch.argsort(weight.order)
        codes, index = codes[:, back], index[back]
    return {
        "qweight": pack_stream(codes, bits).t().contiguous(),
        "qzeros": pack_stream(zeros.t(), bits),
        "scales": weight.scales.t().contiguous(),
        "g_idx": index.to(torch.int32),
    }


def describe(scheme: CheckpointScheme) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that `encode` wrote.

    Asymmetric ones are gptq_v2, which holds a zero of 0; GPTQModel trusts asymmetric v1 files of its own only.
    """
    return {
        "quant_method": NAME,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": scheme.act_order,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "meta": scheme.meta,
    }


def encode(weight: QuantizedWeight, scheme: CheckpointScheme) -> dict[str, Tensor]:
    """The tensors of one layer, scales in fp16. Raises CheckpointError where the format cannot hold it."""
    tensors = write(weight, less_one=scheme.symmetric)
    return {**tensors, "scales": tensors["scales"].to(torch.float16)}


def read_config(config: Mapping[str, Any]) -> "GPTQFormat":
    """The format that a checkpoint's config describes, in whatever spelling.

    Raises CheckpointError for a config that it cannot be, and for two spellings that contradict each other.
    """
    return GPTQFormat(_settled(config))


def version_of(config: Mapping[str, Any]) -> str | None:
    """The version of the format that a config names, None where it names none. Raises CheckpointError for two."""
    version: str | None = one_of(config, ("checkpoint_format", "format"), word)
    return version


def _settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the keys and words that GPTQFormat reads, for all their spellings; what is not said stays away.

    The version is `checkpoint_format` for AutoGPTQ, GPTQModel and vLLM, and `format` for transformers and GPTQModel
    since 4.0, which writes both.
    """
    said = {str(key).lower(): value for key, value in config.items()}
    meta = said.get("meta") if isinstance(said.get("meta"), dict) else {}
    if said.get("is_marlin_format"):
        said["checkpoint_format"] = "marlin"
    order = group_order(next((said[key] for key in _ACT_ORDER if said.get(key) is not None), None))
    static = one_of(said, ("static_groups",)) or one_of(meta or {}, ("static_groups",))
    if isinstance(said.get("zero_point"), bool):
        said.setdefault("sym", not said["zero_point"])
    named = {
        "checkpoint_format": version_of(said),
        "bits": one_of(said, ("bits", "w_bit", "wbits"), whole_number),
        "group_size": one_of(said, ("group_size", "q_group_size", "groupsize"), whole_number),
        "sym": one_of(said, ("sym", "symmetric")),
        "pack_dtype": one_of(said, ("pack_dtype",), word),
        "desc_act": None if order is None else True,
        "static_groups": True if static is True or order == "weight" else None,
    }
    rest = {key: value for key, value in said.items() if key not in {*_ALIASES, *named}}
    return {**rest, **{key: value for key, value in named.items() if value is not None}}


@dataclass(frozen=True)
class GPTQFormat(Format):
    """The format as a checkpoint's config describes it, its spelling settled (`read_config`).

    Raises CheckpointError for a config that it cannot be.
    """

    config: Mapping[str, Any]
    tensors: tuple[str, ...] = TENSORS
    main: str = "qweight"

    def __post_init__(self) -> None:
        check_settings(GPTQSettings, self.config)
        check_config_bits(self.config.get("bits"), "quantization_config")
        said = self.config.get("checkpoint_format", "gptq")
        if said not in {"gptq", "gptq_v2"}:
            raise CheckpointError(
                f"quantization_config: checkpoint_format is {said!r}; read natively are gptq and gptq_v2. Others "
                "(gptq_p, marlin, bitblas, ...) hold repacked weights: use the checkpoint that they were made from"
            )
        if self.config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError(f"quantization_config: pack_dtype is {self.config['pack_dtype']!r}; expected 'int32'")

    def summary(self) -> dict[str, Any]:
        """What a run records of it."""
        return {
            "method": NAME,
            "bits": self.config["bits"],
            "group_size": self.config.get("group_size", 128),
            "symmetric": bool(self.config.get("sym", True)),
            "act_order": bool(self.config.get("desc_act", False)),
            "mixed": bool(self.config.get("dynamic")),
            **({"static_groups": True} if self.config.get("desc_act") and self.config.get("static_groups") else {}),
        }

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The layer's weight, exactly. Raises CheckpointError where a tensor is not what the config says."""
        settings = self._settings(layer)
        bits = check_config_bits(settings.get("bits"), f"quantization_config of {layer.name}")
        inputs, outputs = layer.in_features, layer.out_features
        size = int(settings.get("group_size", 128))
        size = inputs if size == -1 else min(size, inputs)
        groups = -(-inputs // size)
        codes = unpack_stream(layer.words("qweight", (-(-inputs * bits // 32), outputs)).t(), bits, inputs)
        stored = layer.words("qzeros", (groups, -(-outputs * bits // 32)))
        scales = layer.scales("scales", (groups, outputs)).t().contiguous()
        zeros = self._zeros(layer, stored, bits, per_channel=size == inputs).t()
        codes, order = in_group_order(layer, "g_idx", codes, groups, size, required=bool(settings.get("desc_act")))
        return QuantizedWeight.from_codes(codes, scales, zeros, bits, size, order)

    def _settings(self, layer: LayerTensors) -> Mapping[str, Any]:
        """The config with GPTQModel's per-module overrides (`dynamic`: regular expressions, `+:` or none in front)."""
        for pattern, override in (self.config.get("dynamic") or {}).items():
            if not pattern.startswith("-:") and any(matches(pattern.removeprefix("+:"), name) for name in layer.names):
                settings = {**self.config, **_settled(override)}
                check_settings(GPTQSettings, settings, f"quantization_config of {layer.name}")
                if settings.get("checkpoint_format") != self.config.get("checkpoint_format"):
                    raise CheckpointError(f"quantization_config: {layer.name} has a format of its own: it is not read")
                return settings
        return self.config

    def _zeros(self, layer: LayerTensors, stored: Tensor, bits: int, per_channel: bool) -> Tensor:
        """The zeros [G, O] that the writing library itself computes with.

        v1 stores zero - 1. GPTQModel subtracts in whole words, so that a zero of 0 borrows from its neighbour and
        adding in whole words gives all back (3 bits: field by field, modulo 8). AutoGPTQ stores a zero of 0 as the
        largest code and reads that as 0, but with act-order or 3 bits as 2**bits.
        """
        outputs, top = layer.out_features, 2**bits - 1
        if self.config.get("checkpoint_format", "gptq") == "gptq_v2":
            return unpack_stream(stored, bits, outputs)
        if self._by_gptqmodel() and bits != 3:
            ones = pack_stream(torch.ones(1, 32 // bits, dtype=torch.uint8, device=stored.device), bits)
            return unpack_stream(stored + ones, bits, outputs)
        zeros = unpack_stream(stored, bits, outputs).to(torch.int16) + 1
        wraps = self._by_gptqmodel() or (bits != 3 and (per_channel or not self.config.get("desc_act")))
        if wraps:
            zeros = zeros & top
        if int(zeros.max()) > 255:
            raise layer.error("qzeros", "zeros up to 255", "a zero of 256, which AutoGPTQ writes where it meant 0")
        return zeros.to(torch.uint8)

    def _by_gptqmodel(self) -> bool:
        writers = (self.config.get("meta") or {}).get("quantizer") or []
        return any("gptqmodel" in str(writer) for writer in ([writers] if isinstance(writers, str) else writers))
