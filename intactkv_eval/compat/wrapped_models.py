"""The seam to what wraps a transformers model: torch.compile, torch's data parallelism, and peft's PeftModel.

A wrapper hides the signature of the forward, the KV cache and the names of the tensors. So everything else in the
package works on the PreTrainedModel inside, which this module takes out.

    torch.compile(model)                a module that holds `_orig_mod`; the same for single layers of a model
    model.compile()                     a compiled function in the module's own place for one
    model.forward = torch.compile(...)  a compiled function among the attributes of a module
    DataParallel, DistributedData...    modules that hold `module`
    peft.PeftModel                      see peft_api.py
"""

import copy
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from intactkv_eval.compat.module_copies import replaced
from intactkv_eval.compat.peft_api import check_adapters, is_peft_model

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Unwrapped(NamedTuple):
    """model: what was inside, a PreTrainedModel or not. wrappers: what was taken off, the outermost first."""

    model: nn.Module
    wrappers: tuple[str, ...]


def unwrapped(model: nn.Module) -> Unwrapped:
    """The module inside all wrappers that are known; nothing is changed, and nothing is run.

    Raises:
        UnsupportedModelError: The wrapper computes something that the model inside does not.
    """
    wrappers: list[str] = []
    while True:
        inner = _inside(model)
        if inner is None:
            return Unwrapped(_without_compiled_parts(model, wrappers), tuple(wrappers))
        wrappers.append(inner[0])
        model = inner[1]


def _inside(model: Any) -> tuple[str, Any] | None:
    """The name of a wrapper and the module in it, or None where `model` is no wrapper."""
    if _is_compiled(model):
        return "torch.compile", model._orig_mod
    if isinstance(model, _PARALLEL):
        return type(model).__name__, model.module
    if is_peft_model(model):
        check_adapters(model)
        return f"peft {type(model).__name__}", model.get_base_model()
    return None


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod")


def _without_compiled_parts(model: nn.Module, wrappers: list[str]) -> nn.Module:
    """`model` with the layers in the place of their compiled selves, whose names of tensors no checkpoint has."""
    if not any(_is_compiled(module) or _runs_compiled(module) for module in model.modules()):
        return model
    wrappers.append("torch.compile in place")
    plain = replaced(model, lambda module: module._orig_mod if _is_compiled(module) else None)
    return replaced(plain, lambda module: _with_own_forward(module) if _runs_compiled(module) else None)


def _runs_compiled(module: nn.Module) -> bool:
    own = vars(module)
    return own.get("_compiled_call_impl") is not None or _is_compiled_function(own.get("forward"))


def _is_compiled_function(function: Any) -> bool:
    return hasattr(function, "_torchdynamo_orig_callable")


def _with_own_forward(module: nn.Module) -> nn.Module:
    plain = copy.copy(module)
    plain.__dict__.pop("_compiled_call_impl", None)
    if _is_compiled_function(vars(plain).get("forward")):
        del plain.__dict__["forward"]
    return plain


def replaced_forwards(model: nn.Module) -> list[str]:
    """The modules whose forward is a function that was put into them, and that may hold on to the module itself."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in vars(module) and not isinstance(vars(module)["forward"], (MethodType, partial))
    ]
