"""Law 17: a KV cache that was handed to a model was used by it.

A model that does not know the argument under which it gets a cache, or that makes a new cache in the middle of an
answer, computes every token without the pivot and without the KV quantizer, and its numbers look right. So every
cache of ours counts the rows that each layer hands to it, and every forward and every `generate` compares the counts
with the tokens that went in. Knows no pivot and no quantizer.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from intactkv_eval.compat.transformers_api import (
    DynamicCache,
    cache_argument,
    cache_layers,
    generate_cache_argument,
)
from intactkv_eval.errors import UnsupportedModelError


class CountingCache(DynamicCache):
    """A DynamicCache that counts the rows that each layer hands to it. Subclasses override `store`, not `update`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows_given: dict[int, int] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the rows [B, H, T, D] of a layer, and store them. Returns all rows that the layer attends to."""
        self.rows_given[layer_idx] = self.rows_given.get(layer_idx, 0) + key_states.shape[2]
        return self.store(key_states, value_states, layer_idx, *args, **kwargs)

    def store(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [B, H, T, D]. Returns all rows that the layer attends to."""
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return stored


def run_with_cache(module: nn.Module, cache: CountingCache | None, input_ids: Tensor, **inputs: Any) -> Any:
    """The output of one forward of `module` over `input_ids` [B, T], which writes its rows to `cache`.

    Args:
        module: A transformers model, with or without its output head.
        cache: The cache to write to, or None for a forward without one.
        input_ids: Tokens [B, T].
        inputs: What else the forward is given: masks, positions.

    Raises:
        UnsupportedModelError: A layer of the model did not write T rows to the cache.
    """
    before = dict(cache.rows_given) if cache is not None else {}
    output = module(input_ids=input_ids, **cache_argument(module, cache), **inputs)
    if cache is not None:
        _check(module, cache, before, input_ids.shape[1], exact=True)
    return output


def generate_with_cache(model: PreTrainedModel, cache: CountingCache | None, input_ids: Tensor, **options: Any) -> Any:
    """What transformers' `generate` returns for `input_ids` [B, T], of which `cache` holds the first columns already.

    Args:
        model: The model that generates.
        cache: The cache to go on from, or None where generate makes its own.
        input_ids: Tokens [B, T], those whose rows the cache holds among them.
        options: The other arguments of generate.

    Raises:
        UnsupportedModelError: A layer of the model wrote fewer rows to the cache than it had inputs.
    """
    held = cache.get_seq_length() if cache is not None else 0
    before = dict(cache.rows_given) if cache is not None else {}
    output = model.generate(input_ids=input_ids, **generate_cache_argument(cache), **options)
    ids: Tensor = getattr(output, "sequences", output)
    if cache is not None:
        # The last token was never an input. More rows are no fault: what a decoder guesses ahead, it takes off again.
        _check(model, cache, before, ids.shape[1] - 1 - held, exact=False)
    return output


def check_fresh_cache(model: PreTrainedModel, cache: CountingCache, tokens: int) -> None:
    """Check that `model` wrote at least `tokens` rows of every layer to `cache`, into which nothing was written before.

    Raises:
        UnsupportedModelError: A layer wrote fewer.
    """
    _check(model, cache, {}, tokens, exact=False)


def check_layer_call(layer: nn.Module, cache: CountingCache, before: int, tokens: int) -> None:
    """Check that a decoder layer that was run alone on `tokens` tokens wrote as many rows to `cache`.

    Args:
        layer: The decoder layer.
        cache: The cache that it was given.
        before: The sum of the rows that had been counted in the cache.
        tokens: The tokens that the layer was run on.

    Raises:
        UnsupportedModelError: It wrote another number of rows.
    """
    written = sum(cache.rows_given.values()) - before
    if written != tokens:
        raise UnsupportedModelError(_message(layer, f"{written} rows", f"{tokens}"))


def _check(module: nn.Module, cache: CountingCache, before: dict[int, int], expected: int, exact: bool) -> None:
    layers = len(cache_layers(module.config))  # type: ignore[arg-type]
    rows = [cache.rows_given.get(layer, 0) - before.get(layer, 0) for layer in range(layers)]
    wrong = [layer for layer, count in enumerate(rows) if count < expected or (exact and count > expected)]
    if wrong:
        config: Any = module.config
        crossing = set(getattr(config.get_text_config(decoder=True), "cross_attention_layers", None) or ())
        if crossing.issuperset(wrong):
            raise UnsupportedModelError(
                f"{type(module).__name__}: its layers {sorted(crossing)} attend to images alone (cross-attention) and "
                "cache nothing of a text, so that neither a pivot nor a KV quantizer can be given to every layer; use "
                "pivot=none without kv_bits, or --model hf"
            )
        where = f"{rows[wrong[0]]} rows in layer {wrong[0]} ({len(wrong)} of {layers} layers differ)"
        raise UnsupportedModelError(_message(module, where, f"{expected} in every layer"))


def _message(module: nn.Module, written: str, expected: str) -> str:
    return (
        f"{type(module).__name__} did not use the KV cache that it was given: it wrote {written}, expected {expected}. "
        "Its numbers would lack the pivot and the KV quantizer, so the run ends here. Either this release of "
        "transformers hands caches over in a new way, or the model makes a cache of its own: try the newest "
        "transformers that intactkv-eval allows, or use --model hf"
    )
