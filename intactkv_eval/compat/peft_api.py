"""The seam to peft, which is no dependency: its models and layers are recognized by what they have.

peft.PeftModel                      holds the model, into whose layers the adapters (LoRA, ...) were put
model.add_adapter, load_adapter     transformers' own way to put peft's layers into a model, without a PeftModel
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from intactkv_eval.compat.module_copies import probe, replaced
from intactkv_eval.errors import CheckpointError, ConfigError, UnsupportedModelError

_MERGE_ERRORS = (NotImplementedError, ValueError, AttributeError)
_BOUND = {torch.float16: 2**-4, torch.bfloat16: 2**-4}
"""How far the logits of a model with merged adapters may be from those before, of their norm; 1e-3 in fp32."""


def is_peft_model(model: nn.Module) -> bool:
    """Whether `model` is a PeftModel, or another wrapper of peft."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(model).__mro__) and hasattr(
        model, "get_base_model"
    )


def check_adapters(model: Any) -> None:
    """Refuse adapters that work in the forward of the PeftModel, or in front of the texts, and not in the layers."""
    for name in _active(model):
        config = model.peft_config[name]
        kind = _kind(config)
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"peft: the adapter {name!r} ({kind}) puts learned tokens, or their KV, in front of every text, where "
                "the pivot has to stand; use --model hf, or an adapter of weights such as LoRA"
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"peft: the adapter {name!r} (activated LoRA) acts from its invocation tokens on, not on all tokens, "
                "so one KV of a pivot or of a shared beginning does not fit all texts; use --model hf"
            )


def adapters_of(model: nn.Module) -> tuple[str, ...]:
    """The kinds of the adapters of peft that act in `model`, such as ("LORA",); empty where it has none."""
    layers = [module for module in model.modules() if _is_adapted(module)]
    if not any(not getattr(layer, "disable_adapters", False) for layer in layers):
        return ()
    configs: Any = getattr(model, "peft_config", None) or {}
    return tuple(sorted({_kind(configs[name]) for name in _active(model) if name in configs})) or ("adapter",)


def _active(model: Any) -> list[str]:
    """The names of the active adapters: of a PeftModel or its inner model, or of transformers' own adapters."""
    layers = (module for module in model.modules() if _is_adapted(module) and hasattr(module, "active_adapters"))
    layer: Any = next(layers, None)
    named = getattr(layer if layer is not None else model, "active_adapters", None)
    if named is None or callable(named):  # of adapters that are in no layers, transformers would ask peft's release
        named = list(getattr(model, "peft_config", None) or {})
    return [named] if isinstance(named, str) else list(named)


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", "adapter")
    return str(getattr(kind, "value", kind))


def _is_adapted(module: Any) -> bool:
    """Whether a module is one of peft's, in the place of a layer of the model."""
    return type(module).__module__.partition(".")[0] == "peft"


def check_peft_is_here(adapter: str) -> None:
    """Raise ConfigError where the package is not installed."""
    if find_spec("peft") is None:
        raise ConfigError(f"peft={adapter}: needs the package peft, which is not installed: pip install peft")


@contextmanager
def whole_adapters() -> Iterator[None]:
    """While it lasts, an adapter that holds only a part of its tensors raises CheckpointError.

    peft itself leaves the others at random numbers or zeros, and warns.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Mm]issing adapter keys.*")
        try:
            yield
        except UserWarning as warning:
            raise CheckpointError(f"peft: the adapter lacks tensors ({str(warning)[:300]})") from None


@torch.no_grad()
def merged(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with its adapters merged into the layers, so that these are plain; `model` itself is not changed.

    Layers without an adapter are shared with `model`. Merging rounds each sum of a weight and its update to the
    weight's dtype, as peft's merge_and_unload does.

    Raises:
        UnsupportedModelError: A layer cannot be merged, or the merged model computes something else.
    """
    if not any(_is_adapted(module) for module in model.modules()):
        return model
    kinds = adapters_of(model) or ("disabled adapters",)
    plain: Any = replaced(model, lambda module: _merged_layer(module) if _is_adapted(module) else None)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        plain.__dict__.pop(name, None)
    front, head = plain.get_input_embeddings(), plain.get_output_embeddings()
    if getattr(plain.config, "tie_word_embeddings", False) and head is not None and head.weight is not front.weight:
        _untie(plain)
    words = model.get_input_embeddings().weight
    before, after = probe(model, words), probe(plain, words)
    error = float((after - before).double().norm() / before.double().norm())
    bound = _BOUND.get(model.dtype, 1e-3)
    if not error <= bound:
        raise UnsupportedModelError(
            f"peft: merging {', '.join(kinds)} into the layers changes the logits by {error:.2g} of their size "
            f"(rounding: at most {bound:.2g}), so the merged layers are not this model's; quantize nothing in this "
            "cell, or merge the adapter yourself and hand over that model"
        )
    return plain  # type: ignore[no-any-return]


def _merged_layer(module: Any) -> nn.Module:
    layer = copy.deepcopy(module)  # its weights too: a tied one would change elsewhere
    try:
        if hasattr(layer, "unload_and_optionally_merge_module"):
            whole: nn.Module = layer.unload_and_optionally_merge_module(
                merge=True, safe_merge=False, adapter_names=None
            )
            return whole
        if not layer.disable_adapters:
            layer.merge()
        elif layer.merged:
            layer.unmerge()
    except _MERGE_ERRORS as error:
        raise UnsupportedModelError(
            f"peft: the adapter of a {type(module).__name__} cannot be merged into its layer ({error}), and quantized "
            "are plain layers only; leave weights out, or merge it yourself and hand over that model"
        ) from error
    plain: nn.Module = layer.get_base_layer()
    return plain


def untied(model: Any) -> Any:
    """`model`, or a copy that shares its modules and does not tie its embeddings, where an adapter is on one of them.

    transformers' tie_weights, which `hf` calls, would undo such an adapter, or fail on it.
    """
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "tie_word_embeddings", False):
        return model
    if not (_is_adapted(model.get_input_embeddings()) or _is_adapted(model.get_output_embeddings())):
        return model
    apart: Any = copy.copy(model)
    apart.__dict__["_modules"] = dict(model._modules)
    _untie(apart)
    return apart


def _untie(model: Any) -> None:
    model.config = copy.deepcopy(model.config)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def with_adapters_of(model: PreTrainedModel, reference: PreTrainedModel) -> PreTrainedModel:
    """`reference` with the active adapters of `model` put into its layers, in place.

    Raises:
        UnsupportedModelError: They do not fit, or peft cannot put them into another model.
    """
    peft = import_module("peft")
    configs: Any = getattr(model, "peft_config", {})
    for name in _active(model):
        try:
            state = peft.get_peft_model_state_dict(model, adapter_name=name)
            reference = peft.inject_adapter_in_model(copy.deepcopy(configs[name]), reference, adapter_name=name)
            outcome = peft.set_peft_model_state_dict(reference, state, adapter_name=name)
        except (*_MERGE_ERRORS, KeyError, RuntimeError) as error:
            raise UnsupportedModelError(
                f"peft: the adapter {name!r} cannot be put on the reference too ({error}); hand over the "
                "full-precision model with the adapter in it as reference=..."
            ) from error
        if getattr(outcome, "unexpected_keys", None):
            raise UnsupportedModelError(
                f"peft: the adapter {name!r} has no place in the reference for {outcome.unexpected_keys[:2]}: it is "
                "not the full-precision version of the model that carries the adapter"
            )
    return reference.eval()
