"""KVQuantizer: applies the scheme of a cell to keys and values; the one place where schemes are named."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from intactkv_eval.cell.spec import KVSpec
from intactkv_eval.errors import ConfigError
from intactkv_eval.kv_quant.channel_key import ChannelKey
from intactkv_eval.kv_quant.codebook import Codebook
from intactkv_eval.kv_quant.latent import check_keys_are_cached
from intactkv_eval.kv_quant.pre_rope import PreRope
from intactkv_eval.kv_quant.scheme import KVScheme
from intactkv_eval.kv_quant.token_head import TokenHead

LayerKV = tuple[Tensor, Tensor]
"""Keys and values [B, H, T, D] of one layer."""


def _channel_key(spec: KVSpec, model: PreTrainedModel, codebook: Codebook | None) -> KVScheme:
    if spec.group_size is None or spec.residual_length is None:
        raise ConfigError("kv_scheme=channel_key needs kv_group_size and kv_residual_length")
    check_keys_are_cached(model, "channel_key")
    return ChannelKey(spec.bits, spec.group_size, spec.residual_length)


def _pre_rope(spec: KVSpec, model: PreTrainedModel, codebook: Codebook | None) -> KVScheme:
    if codebook is None or codebook.bits != spec.bits:
        held = "none" if codebook is None else f"one of {codebook.bits} bits"
        raise ConfigError(f"kv_scheme=pre_rope,kv_bits={spec.bits} needs a codebook of {spec.bits} bits, got {held}")
    return PreRope(codebook, model)


SCHEMES: dict[str, Callable[[KVSpec, PreTrainedModel, Codebook | None], KVScheme]] = {
    "token_head": lambda spec, model, codebook: TokenHead(spec.bits, spec.rotate, spec.clip),
    "channel_key": _channel_key,
    "pre_rope": _pre_rope,
}


@dataclass(frozen=True)
class KVQuantizer:
    """Quantizes what is written to a cache, but for the first `keep` tokens of each row."""

    scheme: KVScheme
    keep: int = 0

    @property
    def in_groups(self) -> bool:
        """Whether a token's numbers depend on its neighbours, or on how old it is."""
        return self.scheme.group > 1 or self.scheme.recent > 0

    def write(self, keys: Tensor, values: Tensor, layer: int, positions: Tensor) -> LayerKV:
        """Rows [B, H, T, D] at `positions` [B or 1, T] as they are stored; for schemes without groups."""
        fake = self.scheme.keys(keys, layer, positions), self.scheme.values(values, layer, positions)
        if not self.keep:
            return fake
        kept = (positions.to(keys.device) < self.keep)[:, None, :, None]
        return torch.where(kept, keys, fake[0]), torch.where(kept, values, fake[1])


def kv_quantizer_of(spec: KVSpec, model: PreTrainedModel, codebook: Codebook | None = None) -> KVQuantizer | None:
    """The KV quantizer of a cell on `model`, None where its KV cache is not quantized.

    Raises ConfigError for a codebook that is missing or does not fit, UnsupportedModelError where the scheme does not
    fit the model.
    """
    return None if spec.bits == 16 else KVQuantizer(SCHEMES[spec.scheme](spec, model, codebook), spec.sink_tokens)
