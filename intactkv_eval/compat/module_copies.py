"""A module with other modules in the place of some, beside the one that it was made from; and what a model computes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from intactkv_eval.errors import UnsupportedModelError


def replaced(model: nn.Module, replace: Callable[[Any], nn.Module | None]) -> nn.Module:
    """`model` with other modules in it: a shallow copy that shares every tensor and every module that stays.

    replace: a module -> what stands in its place, or None where it stays.
    """
    seen: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in seen:
            seen[id(module)] = visited(module)
        return seen[id(module)]

    def visited(module: nn.Module) -> nn.Module:
        other = replace(module)
        if other is not None:
            return visit(other) if other is not module else module
        children = {name: None if child is None else visit(child) for name, child in module._modules.items()}
        if all(children[name] is child for name, child in module._modules.items()):
            return module
        changed = copy.copy(module)
        changed.__dict__["_modules"] = children
        return changed

    return visit(model)


@torch.no_grad()
def probe(model: nn.Module, words: Tensor) -> Tensor:
    """The logits [1, 8, V] that `model` gives for the first words of its input embeddings `words` [V, D], on the CPU.

    Raises:
        UnsupportedModelError: It gives none.
    """
    ids = torch.arange(min(8, words.shape[0]), device=words.device)[None]
    logits: Tensor | None = getattr(model(input_ids=ids, use_cache=False), "logits", None)
    if logits is None or logits.ndim != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits [B, T, V] of words: it has no language-model head. Load it with "
            "AutoModelForCausalLM"
        )
    return logits.cpu()
