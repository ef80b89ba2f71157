"""RoPE whose frequencies depend on how many positions a forward covers.

    longrope      the short factors up to the length of the training, the long ones beyond   (Phi-3, Phi-4-mini, PhiMoE)
    dynamic NTK   a base that grows with the length beyond max_position_embeddings

A key that was rotated with the frequencies of a short text is no key of a long one. So nothing that was computed up to
the border may stand in front of what is beyond it, and no batch may hold rows of both sides. transformers takes the
frequencies from the largest position of each forward (modeling_rope_utils.dynamic_rope_update); a forward with dynamic
NTK keeps those of the longest text before it until a text comes that is shorter than the border. Knows no pivot.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class RopeByLength:
    """Where the frequencies of a model change.

    border: the most positions of a forward with the first frequencies; None where all lengths have the same.
    grows: whether each length beyond the border has frequencies of its own (dynamic NTK).
    """

    border: int | None = None
    grows: bool = False

    def is_beyond(self, length: int) -> bool:
        """Whether a forward over `length` positions has other frequencies than a short one."""
        return self.border is not None and length > self.border


def rope_by_length(config: PretrainedConfig) -> RopeByLength:
    """How the RoPE frequencies of a model of `config` depend on the length, all its kinds of layers together."""
    own: Any = config.get_text_config(decoder=True)
    parameters = getattr(own, "rope_parameters", None) or getattr(own, "rope_scaling", None) or {}
    nested = [one for one in parameters.values() if isinstance(one, Mapping)]
    borders, grows = [], False
    for one in nested or [parameters]:
        name = str(one.get("rope_type", one.get("type", "default")))
        if name in {"longrope", "su"}:
            border = one.get("original_max_position_embeddings") or own.original_max_position_embeddings
            borders.append(int(border))
        elif "dynamic" in name:
            borders.append(int(own.max_position_embeddings))
            grows = True
    if getattr(own, "use_dynamic_ntk", False):  # the code of Qwen 1's checkpoints
        borders.append(int(own.seq_length))
        grows = True
    return RopeByLength(min(borders), grows) if borders else RopeByLength()


@contextmanager
def as_in_text_of(model: PreTrainedModel, length: int) -> Iterator[None]:
    """While it lasts, every forward of `model` has the RoPE frequencies of a text of at least `length` positions."""

    def longer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": _with_last(kwargs["position_ids"], length)}
        return (args[0], _with_last(args[1], length), *args[2:]), kwargs

    def cut(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part[..., :-1, :] for part in output)

    with ExitStack() as undo:
        for module in _rotary_modules(model):
            undo.callback(module.register_forward_pre_hook(longer, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(cut).remove)
        yield


def forget_long_texts(model: PreTrainedModel) -> None:
    """Go back to the frequencies of short texts where dynamic NTK keeps those of the longest text before.

    transformers does so by itself at the next text that is shorter than the border, but not in every release.
    """
    for module in _rotary_modules(model):
        one: Any = module
        if getattr(one, "original_inv_freq", None) is not None and "dynamic" in str(getattr(one, "rope_type", "")):
            one.inv_freq = one.original_inv_freq.to(one.inv_freq.device).clone()
            one.max_seq_len_cached = one.original_max_seq_len


@torch.no_grad()
def first_position_is_same(model: PreTrainedModel) -> bool:
    """Whether a key at position 0 is the same on both sides of the border: it is not where its scale changes."""
    rope = rope_by_length(model.config)
    if rope.border is None:
        return True
    place = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    like = place.float()[..., None]
    for module in _rotary_modules(model):
        short = module(like, position_ids=place)
        with as_in_text_of(model, rope.border + 1):
            long = module(like, position_ids=place)
        if not all(torch.equal(one, other) for one, other in zip(short, long, strict=True)):
            return False
    return True


def _with_last(positions: Tensor, length: int) -> Tensor:
    """`positions` [..., T] and, behind them, the last position of a text of `length`."""
    return torch.cat([positions, torch.full_like(positions[..., :1], length - 1)], dim=-1)


def _rotary_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that make cos and sin of positions for the decoder."""
    decoder = model.config.get_text_config(decoder=True)
    return [
        module
        for module in model.modules()
        if hasattr(module, "inv_freq") and getattr(module, "config", None) in (decoder, None)
    ]
