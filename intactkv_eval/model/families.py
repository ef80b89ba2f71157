"""What is special about a model family, in one table: a family is one entry here, and one line in a test's table.

Knows names and classes of layers; no cell, no pivot, no quantizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import nn

ScalePlace = Literal["qkv", "values", "mlp", "mlp output"]


class ScaleGroup(NamedTuple):
    """One place where a scale per channel folds into a decoder layer, names relative to the layer.

    front: a norm or linear layer whose outputs are divided. layers: whose columns are multiplied. parent: the module
    whose output shows what quantizing `layers` does; all but that of "qkv" take one input, the layers' own.
    through_activation: the activation stands between front and layers, so that only a ReLU lets a scale through.
    """

    place: ScalePlace
    front: str
    layers: tuple[str, ...]
    parent: str
    through_activation: bool = False


class RotatedLayer(NamedTuple):
    """The names in a decoder layer that a rotation needs: what reads behind each norm, where V is, and what writes."""

    attention_norm: str
    attention: tuple[str, ...]
    value: str
    output: str
    mlp_norm: str
    mlp: tuple[str, ...]
    down: str


@dataclass(frozen=True)
class Family:
    """A model type of transformers, whose layers were read and tested.

    Args:
        layer_class: The class of its decoder layers.
        scale_groups: Where scales fold into a decoder layer (AWQ, OmniQuant); its class decides, since layers of
            the same names may be put together in another way.
        rotation: The names that a rotation needs (QuaRot); None where it cannot be rotated.
        no_rotation: Why it cannot be rotated.
        shares_prefixes: Whether tests hold that rows and branches behind a shared prefix give whole forwards' logits
            (law 14), so that no trial is needed.
    """

    layer_class: str | None = None
    scale_groups: tuple[ScaleGroup, ...] = ()
    rotation: RotatedLayer | None = None
    no_rotation: str | None = None
    shares_prefixes: bool = True


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_SPLIT = RotatedLayer(
    attention_norm="input_layernorm",
    attention=_QKV,
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp=_GATE_UP,
    down="mlp.down_proj",
)
_FUSED = _SPLIT._replace(attention=("self_attn.qkv_proj",), value="self_attn.qkv_proj", mlp=("mlp.gate_up_proj",))


def _split_groups(mlp_norm: str) -> tuple[ScaleGroup, ...]:
    return (
        ScaleGroup("qkv", "input_layernorm", _QKV, "self_attn"),
        ScaleGroup("values", "self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj"),
        ScaleGroup("mlp", mlp_norm, _GATE_UP, "mlp"),
        ScaleGroup("mlp output", "mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    )


_LLAMA_GROUPS = _split_groups("post_attention_layernorm")
_GEMMA_GROUPS = _split_groups("pre_feedforward_layernorm")  # post_attention_layernorm is on the attention's output
_PHI3_GROUPS = (  # its V could be scaled, but pivot/basis.py does not find it in a fused matrix
    ScaleGroup("qkv", "input_layernorm", ("self_attn.qkv_proj",), "self_attn"),
    ScaleGroup("mlp", "post_attention_layernorm", ("mlp.gate_up_proj",), "mlp"),
    ScaleGroup("mlp output", "mlp.gate_up_proj", ("mlp.down_proj",), "mlp.down_proj"),
)
_OPT_GROUPS = (
    ScaleGroup("values", "self_attn.v_proj", ("self_attn.out_proj",), "self_attn.out_proj"),
    ScaleGroup("qkv", "self_attn_layer_norm", _QKV, "self_attn"),
    ScaleGroup("mlp", "final_layer_norm", ("fc1",), "fc1"),
    ScaleGroup("mlp output", "fc1", ("fc2",), "fc2", through_activation=True),
)
_NORMS_BEHIND = "its norms behind attention and MLP have no layer to be fused into"
_MEAN = "its LayerNorm subtracts a mean, which a rotation does not keep"

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "gemma2": Family(no_rotation=_NORMS_BEHIND, shares_prefixes=False),
        "gemma3_text": Family("Gemma3DecoderLayer", _GEMMA_GROUPS, no_rotation=_NORMS_BEHIND),
        "gpt2": Family(no_rotation=_MEAN),
        "llama": Family("LlamaDecoderLayer", _LLAMA_GROUPS, _SPLIT),
        "mistral": Family("MistralDecoderLayer", _LLAMA_GROUPS, _SPLIT),
        "opt": Family("OPTDecoderLayer", _OPT_GROUPS, no_rotation=_MEAN),
        "phi3": Family("Phi3DecoderLayer", _PHI3_GROUPS, _FUSED),
        "qwen2": Family("Qwen2DecoderLayer", _LLAMA_GROUPS, _SPLIT),
        "qwen3": Family("Qwen3DecoderLayer", _LLAMA_GROUPS, _SPLIT),
    }
)
"""By transformers' model_type."""


def family_of_layer(layer: nn.Module) -> Family | None:
    """The family whose decoder layers are of this layer's class and have known scale groups, None where it is none."""
    name = type(layer).__name__
    return next((family for family in FAMILIES.values() if family.layer_class == name), None)


def rotatable() -> list[str]:
    """The model types that can be rotated."""
    return sorted(name for name, family in FAMILIES.items() if family.rotation is not None)


def norm_offset(norm: nn.Module) -> int:
    """What a norm adds to its weight before it multiplies by it: Gemma's norms multiply by 1 + weight."""
    name = type(norm).__name__.lower()
    return 1 if "gemma" in name and "gemma3n" not in name else 0
