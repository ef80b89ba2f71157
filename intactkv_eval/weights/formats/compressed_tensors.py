"""compressed-tensors checkpoints in format pack-quantized (llm-compressor): weight-only whole-number schemes.

    weight_packed [O, ceil(I*b/32)]  codes, a dense bit stream along each row      weight_scale [O, G]
    weight_zero_point [ceil(O*b/32), G]  zeros, a dense bit stream down each column; absent where symmetric
    weight_shape [2]   weight_g_idx [I]  the group of each input (actorder `group` only)

Codes and zeros are stored with 2**(b-1) added, so they are unsigned. Releases before dense packing put 32 // b codes in
a word; the two differ in width, which tells them apart. Zeros that are plain int8 [O, G], as releases before 0.9.4 and
strategy `tensor` have them, are signed. Source: compressed-tensors 0.8 to 0.20, compressors/pack_quantized.
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
from intactkv_eval.weights.formats.settings import CompressedTensorsSettings, check_settings
from intactkv_eval.weights.formats.spellings import group_order, whole_number, word
from intactkv_eval.weights.quantized import QuantizedWeight

NAME = "compressed-tensors"
_STRATEGIES = ("group", "channel", "tensor")
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def describe(scheme: CheckpointScheme) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that `encode` wrote."""
    grouped = scheme.group_size != -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if grouped else "channel",
        "group_size": scheme.group_size if grouped else None,
        "dynamic": False,
        "actorder": None,
    }
    return {
        "quant_method": NAME,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
        "ignore": list(scheme.kept),
        "kv_cache_scheme": None,
        "version": scheme.made_by,
    }


def encode(weight: QuantizedWeight, scheme: CheckpointScheme) -> dict[str, Tensor]:
    """The tensors of one layer. Raises CheckpointError where the format cannot hold it."""
    if weight.order is not None:
        raise CheckpointError("compressed-tensors: act-order is not written: use --format gptq")
    tensors = {
        "weight_packed": pack_stream(weight.unpacked(), weight.bits),
        "weight_scale": weight.scales.contiguous(),
        "weight_shape": torch.tensor([weight.out_features, weight.in_features]),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_stream(weight.zeros.t(), weight.bits).t().contiguous()
    return tensors


def read_config(config: Mapping[str, Any]) -> "CompressedTensorsFormat":
    """The format that a checkpoint's config describes, in the spelling of any release. Raises CheckpointError."""
    if not config.get("config_groups"):
        raise CheckpointError("quantization_config: config_groups is empty: it does not say what is quantized")
    check_settings(CompressedTensorsSettings, config)
    groups = {name: _settled(group, config.get("format")) for name, group in config["config_groups"].items()}
    return CompressedTensorsFormat({**config, "config_groups": groups})


def is_idle(config: Mapping[str, Any]) -> bool:
    """Whether a config of this method quantizes nothing: it only says how sparse weights are that are stored densely.

    Raises CheckpointError where they are stored sparsely.
    """
    if config.get("config_groups") or config.get("transform_config"):
        return False
    _check_sparsity(config.get("sparsity_config"))
    return "sparsity_config" in config


def _settled(group: Mapping[str, Any], format_of_all: object) -> dict[str, Any]:
    """A group of the config with what it leaves out, as the library infers it; words in small letters."""
    weights = dict(group["weights"])
    if weights.get("strategy") is None:
        size = weights.get("group_size")
        weights["strategy"] = "tensor" if size is None else "channel" if size == -1 else "group"
    said = group.get("format")
    return {
        **group,
        "format": format_of_all if said is None else said,
        "weights": {
            **weights,
            "strategy": word(weights["strategy"]),
            "type": word(weights.get("type", "int")),
            "num_bits": whole_number(weights.get("num_bits")),
            "actorder": group_order(weights.get("actorder")),
        },
    }


@dataclass(frozen=True)
class CompressedTensorsFormat(Format):
    """The format as a checkpoint's config describes it, its spelling settled (`read_config`).

    Raises CheckpointError for what would be ignored if it were read: quantized activations, KV cache, transforms, and
    sparse weights.
    """

    config: Mapping[str, Any]
    tensors: tuple[str, ...] = TENSORS
    main: str = "weight_packed"

    def __post_init__(self) -> None:
        _check_sparsity(self.config.get("sparsity_config"))
        transforms = self.config.get("transform_config")
        idle = isinstance(transforms, dict) and not any(transforms.values())
        for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
            if self.config.get(key) and not (key == "transform_config" and idle):
                raise CheckpointError(f"quantization_config: {key} is set, which is not read; it would be ignored")
        for name, group in self.config["config_groups"].items():
            _check_group(f"quantization_config: config_groups.{name}", group)

    def summary(self) -> dict[str, Any]:
        """What a run records of it."""
        weights = [group["weights"] for group in self.config["config_groups"].values()]
        first = weights[0]
        read = ("num_bits", "group_size", "symmetric", "strategy", "actorder")
        return {
            "method": NAME,
            "bits": first["num_bits"],
            "group_size": first.get("group_size") or -1,
            "symmetric": first.get("symmetric") is not False,
            "act_order": first["actorder"] is not None,
            "mixed": any(one.get(key) != first.get(key) for one in weights for key in read),
            **({"static_groups": True} if first["actorder"] == "weight" else {}),
        }

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The layer's weight, exactly. Raises CheckpointError where a tensor is not what the config says."""
        weights = self._weights(layer)
        bits, inputs, outputs = int(weights["num_bits"]), layer.in_features, layer.out_features
        shape = layer.integers("weight_shape", (2,), 2**31).tolist()
        if shape != [outputs, inputs]:
            raise layer.error("weight_shape", [outputs, inputs], shape)
        size = inputs if weights["strategy"] != "group" else min(int(weights.get("group_size") or -1), inputs)
        if size < 1:
            raise CheckpointError(f"{layer.name}: strategy group with group_size {weights.get('group_size')}")
        groups = -(-inputs // size)
        codes = _unpack(layer, "weight_packed", bits, outputs, inputs)
        scales, zeros = _scales_and_zeros(layer, weights, groups)
        act_order = weights["actorder"] == "group" and groups > 1
        codes, order = in_group_order(layer, "weight_g_idx", codes, groups, size, required=act_order)
        return QuantizedWeight.from_codes(codes, scales, zeros, bits, size, order)

    def _weights(self, layer: LayerTensors) -> Mapping[str, Any]:
        """The scheme of the layer: that of the most exact of the targets that it matches, by any of its names."""
        found: dict[int, Mapping[str, Any]] = {}
        for group in self.config["config_groups"].values():
            for target in group.get("targets") or ():
                if target in layer.names:
                    found[0] = group["weights"]
                elif target.startswith("re:"):
                    if any(matches(target.removeprefix("re:"), name) for name in layer.names):
                        found.setdefault(1, group["weights"])
                elif target in layer.kinds:
                    found.setdefault(2, group["weights"])
        if not found:
            raise CheckpointError(f"{layer.name}: is packed, but no target of quantization_config names it")
        return found[min(found)]


def _check_sparsity(said: object) -> None:
    """Raise CheckpointError where weights are stored sparsely: as a mask, and the numbers that are not zero.

    A config that says how sparse weights are that are stored densely is idle, and so is one that says none are.
    """
    if not said:
        return
    if not isinstance(said, dict):
        raise CheckpointError(f"quantization_config: sparsity_config is {said!r:.80}; expected a JSON object")
    stored, sparsity = said.get("format"), said.get("global_sparsity")
    is_none = isinstance(sparsity, int | float) and sparsity == 0
    if stored is None or word(stored) == "dense" or is_none:
        return
    raise CheckpointError(
        f"quantization_config: sparsity_config says that weights are stored sparsely (format {stored!r:.40}, structure "
        f"{said.get('sparsity_structure')!r:.40}), which is not read: save it with the sparsity format dense, or take "
        "the checkpoint without sparsity"
    )


def _check_group(source: str, group: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a group of the config that is not read."""
    weights = group["weights"]
    if group["format"] != "pack-quantized":
        raise CheckpointError(f"{source}: format is {group['format']!r:.40}; read natively is 'pack-quantized'")
    check_config_bits(weights["num_bits"], f"{source}.weights.num_bits")
    if weights["type"] != "int" or weights["strategy"] not in _STRATEGIES:
        raise CheckpointError(
            f"{source}: weights of type {weights['type']!r:.40}, strategy {weights['strategy']!r:.40}; read are type "
            f"int, strategies {', '.join(_STRATEGIES)}"
        )
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(f"{source}.{key} is set and would be ignored")


def _scales_and_zeros(layer: LayerTensors, weights: Mapping[str, Any], groups: int) -> tuple[Tensor, Tensor]:
    """Scales [O, G], and zeros [O, G] as unsigned codes; of strategy tensor there is one of each for all."""
    bits, outputs = int(weights["num_bits"]), layer.out_features
    held = (1,) if weights["strategy"] == "tensor" else (outputs, groups)
    scales = layer.scales("weight_scale", held).expand(outputs, groups).contiguous()
    middle = 2 ** (bits - 1)
    if layer.dtype("weight_zero_point") == torch.int8:
        signed = layer.signed("weight_zero_point", held, bits).expand(outputs, groups)
        return scales, (signed + middle).to(torch.uint8)
    if layer.has("weight_zero_point"):
        return scales, _unpack(layer, "weight_zero_point", bits, groups, outputs, down=True).t()
    if weights.get("symmetric") is False:
        raise layer.error("weight_zero_point", "the tensor (symmetric is false)", "none")
    return scales, torch.full((outputs, groups), middle, dtype=torch.uint8)


def _unpack(layer: LayerTensors, key: str, bits: int, rows: int, count: int, down: bool = False) -> Tensor:
    """The elements [rows, count] of a packed tensor, stored transposed where `down`."""
    dense, loose = -(-count * bits // 32), -(-count // (32 // bits))
    shapes = [(width, rows) if down else (rows, width) for width in (dense, loose)]
    is_loose = layer.shape(key) == shapes[1] and dense != loose
    words = layer.words(key, shapes[1] if is_loose else shapes[0])
    words = words.t() if down else words
    if not is_loose:
        return unpack_stream(words, bits, count)
    per_word = 32 // bits
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    values: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.reshape(rows, -1)[:, :count].to(torch.uint8)
