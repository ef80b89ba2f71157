"""compressed-tensors checkpoints in format pack-quantized (llm-compressor): weight-only whole-number schemes.

    weight_packed [O, ceil(I*b/32)]  codes, a dense bit stream along each row      weight_scale [O, G]
    weight_zero_point [ceil(O*b/32), G]  zeros, a dense bit stream down each column; absent where symmetric
    weight_shape [2]   weight_g_idx [I]  the group of each input (actorder `group` only)

Codes and zeros are stored with 2**(b-1) added, so they are unsigned. Releases before dense packing put 32 // b codes in
a word; the two differ in width, which tells them apart. Source: compressed-tensors 0.20, compressors/pack_quantized.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.formats.bitstream import pack_stream, unpack_stream
from intactkv_eval.weights.formats.layer import LayerTensors, check_config_bits, in_group_order
from intactkv_eval.weights.formats.patterns import matches
from intactkv_eval.weights.formats.scheme import Scheme
from intactkv_eval.weights.formats.settings import CompressedTensorsSettings, check_settings
from intactkv_eval.weights.quantized import QuantizedWeight

NAME = "compressed-tensors"
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def describe(scheme: Scheme) -> dict[str, Any]:
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


def encode(weight: QuantizedWeight, scheme: Scheme) -> dict[str, Tensor]:
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


@dataclass(frozen=True)
class CompressedTensorsFormat:
    """The format as a checkpoint's config describes it.

    Raises CheckpointError for what would be ignored if it were read: quantized activations, KV cache, transforms.
    """

    config: Mapping[str, Any]
    tensors: tuple[str, ...] = TENSORS
    main: str = "weight_packed"

    def __post_init__(self) -> None:
        said = self.config.get("format")
        if said != "pack-quantized":
            raise CheckpointError(f"quantization_config: format is {said!r}; read natively is 'pack-quantized'")
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            if self.config.get(key):
                raise CheckpointError(f"quantization_config: {key} is set, which is not read; it would be ignored")
        if not self._groups():
            raise CheckpointError("quantization_config: config_groups is empty: it does not say what is quantized")
        check_settings(CompressedTensorsSettings, self.config)
        for name, group in self._groups().items():
            weights = group.get("weights") or {}
            check_config_bits(weights.get("num_bits"), f"quantization_config: config_groups.{name}.weights.num_bits")
            if weights.get("type", "int") != "int" or weights.get("strategy") not in ("group", "channel"):
                raise CheckpointError(
                    f"quantization_config: config_groups.{name}: weights of type {weights.get('type')!r}, strategy "
                    f"{weights.get('strategy')!r}; read are type int, strategies group and channel"
                )
            for key in ("input_activations", "output_activations"):
                if group.get(key):
                    raise CheckpointError(
                        f"quantization_config: config_groups.{name}.{key} is set and would be ignored"
                    )

    def summary(self) -> dict[str, Any]:
        """What a run records of it."""
        weights = [group["weights"] for group in self._groups().values()]
        first = weights[0]
        return {
            "method": NAME,
            "bits": first["num_bits"],
            "group_size": first.get("group_size") or -1,
            "symmetric": bool(first.get("symmetric", True)),
            "act_order": first.get("actorder") == "group",
            "mixed": any(one != first for one in weights),
        }

    def read(self, layer: LayerTensors) -> QuantizedWeight:
        """The layer's weight, exactly. Raises CheckpointError where a tensor is not what the config says."""
        weights = self._weights(layer)
        bits, inputs, outputs = int(weights["num_bits"]), layer.in_features, layer.out_features
        shape = layer.integers("weight_shape", (2,), 2**31).tolist()
        if shape != [outputs, inputs]:
            raise layer.error("weight_shape", [outputs, inputs], shape)
        size = inputs if weights["strategy"] == "channel" else min(int(weights.get("group_size") or -1), inputs)
        if size < 1:
            raise CheckpointError(f"{layer.name}: strategy group with group_size {weights.get('group_size')}")
        groups = -(-inputs // size)
        codes = _unpack(layer, "weight_packed", bits, outputs, inputs)
        scales = layer.scales("weight_scale", (outputs, groups))
        if layer.has("weight_zero_point"):
            zeros = _unpack(layer, "weight_zero_point", bits, groups, outputs, down=True).t()
        elif weights.get("symmetric", True):
            zeros = torch.full((outputs, groups), 2 ** (bits - 1), dtype=torch.uint8)
        else:
            raise layer.error("weight_zero_point", "the tensor (symmetric is false)", "none")
        act_order = weights.get("actorder") == "group"
        codes, order = in_group_order(layer, "weight_g_idx", codes, groups, size, required=act_order)
        return QuantizedWeight.from_codes(codes, scales, zeros, bits, size, order)

    def _groups(self) -> Mapping[str, Any]:
        groups = self.config.get("config_groups")
        return groups if isinstance(groups, dict) else {}

    def _weights(self, layer: LayerTensors) -> Mapping[str, Any]:
        """The scheme of the layer: that of the most exact of the targets that it matches."""
        found: dict[int, Mapping[str, Any]] = {}
        for group in self._groups().values():
            for target in group.get("targets") or ():
                if target == layer.name:
                    found[0] = group["weights"]
                elif target.startswith("re:") and matches(target.removeprefix("re:"), layer.name):
                    found.setdefault(1, group["weights"])
                elif target == "Linear":
                    found.setdefault(2, group["weights"])
        if not found:
            raise CheckpointError(f"{layer.name}: is packed, but no target of quantization_config names it")
        return found[min(found)]


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
