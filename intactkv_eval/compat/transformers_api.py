"""The seam to transformers: argument names, cache classes and helpers that differ from release to release.

Supported are transformers 5.0 to the newest release that pyproject.toml allows. The rest of the package imports these
names from here, and nothing else of transformers but what its documentation calls public at the top level. Knows no
model of ours.

    past_key_values -> cache    the argument and the output field of every forward, renamed in transformers 5.24
    strftime_now                of chat templates: reads the name `datetime` of transformers.utils.chat_template_utils
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, tzinfo
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.initialization import no_init_weights
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D
from transformers.utils import chat_template_utils
from transformers.utils.hub import cached_file

from intactkv_eval.errors import UnsupportedModelError

__all__ = [
    "CONFIG_MAPPING",
    "Cache",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "attention_implementation",
    "before_loading",
    "cache_argument",
    "cache_layers",
    "cached_file",
    "file_of",
    "generate_cache_argument",
    "ignored_tensors",
    "keeps_given_cache",
    "largest_number",
    "loads_as",
    "no_init_weights",
    "renamed_on_loading",
    "set_output_cache",
    "takes_cache",
    "template_clock",
    "template_now",
    "tied_tensors",
    "unknown_cache_argument",
]

_CACHE_NAMES = ("cache", "past_key_values")  # the newest first: a model that knows both warns of the older one


def _cache_name(function: Any) -> str | None:
    """The name under which `function` takes a KV cache, or None where it takes none."""
    parameters = inspect.signature(function).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def takes_cache(module: nn.Module) -> bool:
    """Whether the forward of `module` takes a KV cache."""
    return _cache_name(type(module).forward) is not None


def unknown_cache_argument(function: Any) -> str:
    """The reason why a cache cannot be handed to `function`, as a part of a sentence."""
    names = " or ".join(_CACHE_NAMES)
    return f"{function.__qualname__} has no argument named {names} (transformers {version('transformers')})"


def cache_argument(module: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that hands `cache` to the forward of `module`, with `use_cache` set accordingly.

    Args:
        module: A transformers model or layer, or a wrapper that passes its arguments on.
        cache: The cache to hand over, or None for a forward without a cache.

    Returns:
        Keyword arguments for the forward. The name of the cache is read from the signature, so that the code of a
        checkpoint may still use the older one. Without a cache a model whose last layers attend to what earlier ones
        cached (Gemma 3n) makes one of its own: in early releases these layers compute other keys otherwise.

    Raises:
        UnsupportedModelError: The forward names its arguments, and none of them is a cache.
    """
    if cache is None:
        return {"use_cache": _borrows_keys(module)}
    forward = type(module).forward
    name = _cache_name(forward)
    if name is None and "input_ids" in inspect.signature(forward).parameters:
        raise UnsupportedModelError(f"{type(module).__name__} takes no KV cache: {unknown_cache_argument(forward)}")
    return {name or _CACHE_NAMES[0]: cache, "use_cache": True}


def _borrows_keys(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    return config is not None and bool(getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0))


def generate_cache_argument(cache: Cache | None) -> dict[str, Any]:
    """The keyword argument that hands `cache` to transformers' `generate`; with None, generate makes its own cache.

    Raises:
        UnsupportedModelError: This release of transformers names the cache in a way that is not known here.
    """
    if cache is None:
        return {"use_cache": True}
    # `generate` passes model arguments on by name, and names the cache as its own helper does.
    helper = GenerationMixin.prepare_inputs_for_generation
    name = _cache_name(helper)
    if name is None:
        raise UnsupportedModelError(f"generate takes no KV cache: {unknown_cache_argument(helper)}")
    return {name: cache, "use_cache": True}


@contextmanager
def keeps_given_cache(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts, `generate` goes on from the cache that it is given, also where `model` would make a new one.

    Models with two sets of RoPE frequencies (Phi-3, PhiMoE) drop a cache that is shorter than the border between them
    where the text is longer. A caller whose cache has the frequencies of the long text keeps it so.
    """
    usual = GenerationMixin.prepare_inputs_for_generation
    if type(model).prepare_inputs_for_generation is usual:
        yield
        return
    own: Any = model
    own.prepare_inputs_for_generation = MethodType(usual, model)
    try:
        yield
    finally:
        del own.prepare_inputs_for_generation


@contextmanager
def before_loading(check: Callable[[nn.Module, Sequence[str], bool], None]) -> Iterator[None]:
    """While it lasts, `from_pretrained` calls `check` when it has built a model and has not allocated or read a tensor.

    Args:
        check: A function of the model, whose tensors are on meta; of the weight files; and of whether they are
            quantized in a way that transformers reads. What it raises ends the loading.
    """
    held = vars(PreTrainedModel).get("_load_pretrained_model")  # a static method in newer releases, else a class method
    if held is None:
        yield
        return

    def checked(cls: Any, model: Any, state: Any, files: Any, settings: Any, *rest: Any, **named: Any) -> Any:
        check(model, files or [], getattr(settings, "hf_quantizer", None) is not None)
        return held.__get__(None, cls)(model, state, files, settings, *rest, **named)

    PreTrainedModel._load_pretrained_model = classmethod(checked)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = held


def set_output_cache(output: Any, cache: Cache) -> None:
    """Replace the KV cache in the output of a forward, from which `generate` goes on.

    Raises:
        UnsupportedModelError: The output has no field for a cache.
    """
    name = next((name for name in _CACHE_NAMES if hasattr(output, name)), None)
    if name is None:
        raise UnsupportedModelError(f"{type(output).__name__} has no field named {' or '.join(_CACHE_NAMES)}")
    setattr(output, name, cache)


def cache_layers(config: PretrainedConfig) -> list[Any]:
    """The cache layers that transformers makes for a model of `config`: their kinds and number, without any rows.

    Last layers that attend to what earlier ones cached (Gemma 3n, Gemma 4 E2B) have none: newer releases make a
    placeholder for each of them.
    """
    layers: list[Any] = DynamicCache(config=config).layers
    while layers and type(layers[-1]).__name__ == "DummyLayer":
        layers.pop()
    return layers


def loads_as(config: PretrainedConfig) -> list[str]:
    """The auto classes that load a model of `config`, of those that matter here: transformers' own and its code's."""
    kinds = {
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    own = getattr(config, "auto_map", None) or {}
    return [name for name, known in kinds.items() if config.model_type in known or name in own]


def largest_number(config: PretrainedConfig, name: str) -> int | None:
    """A config's attribute, the largest one where it differs from layer to layer; None where it has none."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # newer releases: it is each layer's own
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    numbers = [value for value in (found if isinstance(found, list | tuple) else [found]) if isinstance(value, int)]
    return max(numbers, default=None)


def attention_implementation(model: PreTrainedModel) -> str | None:
    """The name of the attention function that `model` calls: "sdpa", "eager", "flash_attention_2", ..."""
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return name


def file_of(pretrained: str, name: str, revision: str = "main") -> Path | None:
    """The file `name` of a checkpoint, a folder or a name on the hub; None where it has no such file.

    Of the hub it is fetched, or taken from the local cache; None where neither can be.
    """
    found = cached_file(
        pretrained,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def renamed_on_loading(model: PreTrainedModel) -> Callable[[str], tuple[str, bool]]:
    """How transformers calls a checkpoint's tensors when it loads them into `model`.

    Returns:
        A function of a tensor's name in the checkpoint. It gives the name in the model, before a prefix of the base
        model is added or removed, and whether the tensor is converted on the way: joined with others, as experts that
        are stored apart, split or transposed.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]

    def renamed(stored: str) -> tuple[str, bool]:
        name, pattern = rename_source_key(stored, renamings, converters)
        return str(name), pattern is not None

    return renamed


def tied_tensors(model: PreTrainedModel) -> dict[str, str]:
    """The tensors of `model` that are another tensor, by name; none where its config does not tie them."""
    return dict(model.all_tied_weights_keys or {}) if getattr(model.config, "tie_word_embeddings", False) else {}


def ignored_tensors(model: PreTrainedModel) -> list[str]:
    """Regular expressions of the tensors that checkpoints of this architecture may hold without any use."""
    return list(model._keys_to_ignore_on_load_unexpected or ())


def template_now() -> datetime:
    """The present time as chat templates read it: local time, without a time zone."""
    now: datetime = chat_template_utils.datetime.now()  # type: ignore[attr-defined]
    return now


@contextmanager
def template_clock(moment: datetime | None) -> Iterator[None]:
    """While it lasts, `strftime_now` of every chat template gives `moment`; with None it gives the present time.

    transformers turns whatever a template is given besides the messages into plain data, so no function can be handed
    to it: the clock that it reads is replaced instead, and put back.
    """
    if moment is None:
        yield
        return

    class FixedClock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            assert moment is not None
            return moment if tz is None else moment.astimezone(tz)

    module: Any = chat_template_utils
    held = module.datetime
    module.datetime = FixedClock
    try:
        yield
    finally:
        module.datetime = held
