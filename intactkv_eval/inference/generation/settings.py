"""The settings of transformers' `generate`: which of them generation behind a pivot serves, drops or refuses.

They come from two places: the checkpoint's generation_config.json, and the options of a request, which are a task's
generation_kwargs and lm_eval's --gen_kwargs. An option wins over the file. A setting that changes no number (a static
cache, prompt lookup, the form of the output) is dropped from the file, and refused among the options, where it would
do nothing. What transformers 5 does not generate without code from the Hub is refused. Every other setting is handed
to `generate`. Knows no lm_eval and no pivot.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import nn
from transformers import GenerationConfig

from intactkv_eval.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = "generation_config.json"
_CACHES = "the caches of this package hold the same numbers"
_FORM = "only the tokens are read"
_GUESSES = "guessing tokens ahead changes the speed alone"
DROPPED = {
    "cache_implementation": _CACHES,
    "max_cache_len": _CACHES,
    "prefill_chunk_size": _CACHES,
    "compile_config": "the model is not compiled",
    "prompt_lookup_num_tokens": _GUESSES,
    "assistant_early_exit": _GUESSES,
    "use_mtp": _GUESSES,
    "speculation_type": _GUESSES,
    "return_dict_in_generate": _FORM,
    "output_scores": _FORM,
    "output_logits": _FORM,
    "output_attentions": _FORM,
    "output_hidden_states": _FORM,
}
"""Settings that change no number, and why."""

_HUB = "transformers 5 runs it by code from the Hub alone"
_LOOKS_BACK = (
    "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "sequence_bias",
    "watermarking_config", "forced_bos_token_id", "stop_strings",
)  # fmt: skip
_OF_THE_WHOLE = (
    "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "guidance_scale",
    "exponential_decay_length_penalty", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size",
    "watermarking_config", "max_time", "stop_strings",
)  # fmt: skip
_COUNTS = ("num_beams", "num_beam_groups", "num_return_sequences", "min_length", "min_new_tokens", "max_new_tokens")
_DEFAULTS = {"length_penalty": 1.0, "early_stopping": False, "do_sample": False}  # what None may not stand for
_OFF = {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0}  # where neither None, 0 nor False turns it off


@dataclass(frozen=True)
class Served:
    """options: for `generate`, over those of the file. beams: how many. by_length: rows may not have padding, since a
    setting counts a row's tokens or looks back at them. in_one_go: an answer may not be made in several calls.
    """

    options: dict[str, Any]
    beams: int = 1
    by_length: bool = False
    in_one_go: bool = False


def known_settings() -> list[str]:
    """The settings that this release of transformers has, by the names of its GenerationConfig."""
    return [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]


def plain_greedy() -> dict[str, Any]:
    """Options of one greedy step, whatever a checkpoint's file asks for."""
    known = known_settings()
    plain = {"num_beams": 1, "num_return_sequences": 1, "do_sample": False, "guidance_scale": None}
    none = (*DROPPED, "stop_strings", "token_healing", "max_time", "penalty_alpha", "dola_layers")
    off = {**dict.fromkeys(none), **plain}
    return {key: value for key, value in off.items() if key in known}


def served(file: GenerationConfig, options: Mapping[str, Any], quantizes_kv: bool = False) -> Served:
    """What `generate` is given for `options`, beside a model whose settings are `file`.

    An option of None turns off what the file asks for. quantizes_kv: whether the rows of the KV cache are quantized as
    they are written. Raises ConfigError for a setting that cannot be served, with the place where it was found.
    """
    known = known_settings()
    _check_counts(file)
    both = {**{key: getattr(file, key, None) for key in known}, **options}
    _check_served(both, options, quantizes_kv)
    out = {key: _DEFAULTS.get(key) if value is None else value for key, value in options.items()}
    for key, reason in DROPPED.items():
        if key in known:
            if key not in options and getattr(file, key, None) not in (None, False):
                _tell(key, repr(getattr(file, key)), reason)
            out[key] = None
    beams = int(both.get("num_beams") or 1)
    return Served(
        {**out, "num_beams": beams, "num_return_sequences": 1, "max_length": None},
        beams,
        any(_is_on(both, key) for key in _LOOKS_BACK),
        any(_is_on(both, key) for key in _OF_THE_WHOLE),
    )


@dataclass(frozen=True)
class OwnLengths:
    """How long answers are beside lm_eval's number of new tokens, in tokens.

    new: of new tokens, by the file, which transformers prefers to any `max_length`, and so to lm_eval's. total: of
    prompt and answer. shortest: the least of both.
    """

    new: int | None = None
    total: int | None = None
    shortest: int | None = None

    def new_tokens(self, prompt: int, otherwise: int) -> int:
        """The most new tokens behind a prompt of so many, as its tokenizer makes it."""
        if self.new is not None:
            return self.new
        return otherwise if self.total is None else self.total - prompt

    def least(self, prompt: int, new: int) -> int | None:
        """The least new tokens behind it, of at most `new`; None where nothing is asked."""
        return None if self.shortest is None else min(max(0, self.shortest - prompt), new)


def own_lengths(file: GenerationConfig, options: Mapping[str, Any]) -> OwnLengths:
    """The lengths that a checkpoint's settings and lm_eval's options ask for, by the precedence of `generate`."""
    shortest = options.get("min_length", file.min_length)
    least = options.get("min_new_tokens", file.min_new_tokens)
    return OwnLengths(file.max_new_tokens, options.get("max_length"), shortest if shortest and least is None else None)


@lru_cache(maxsize=16)
def say_length(new: int) -> None:
    """Log once that the file's number of new tokens counts."""
    logger.warning("%s: max_new_tokens=%d counts instead of max_gen_toks, as in lm_eval's hf", FILE, new)


def _is_on(settings: Mapping[str, Any], key: str) -> bool:
    value = settings.get(key)
    return bool(value is not None and value != _OFF.get(key, 0))


@lru_cache(maxsize=256)
def _tell(key: str, value: str, reason: str) -> None:
    """Once for each value."""
    logger.warning("%s: %s=%s is left out: %s", FILE, key, value, reason)


def _check_counts(file: GenerationConfig) -> None:
    """Raise ConfigError for a number of the file that is none."""
    for key in _COUNTS:
        value = getattr(file, key, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{FILE}: {key}={value!r}: expected a whole number")


def _check_served(both: Mapping[str, Any], options: Mapping[str, Any], quantizes_kv: bool) -> None:
    """Raise ConfigError for a setting of `both` places, `options` among them, that cannot be served."""
    reasons = {
        key: f"it does nothing here, since {reason}"
        for key, reason in DROPPED.items()
        if options.get(key) not in (None, False) and (key, options[key]) != ("cache_implementation", "dynamic")
    }
    if both.get("cache_implementation") == "quantized":
        reasons["cache_implementation"] = (
            "it quantizes the KV cache by another package's formula; choose kv_bits=... of this one, or --model hf"
        )
    beams = int(both.get("num_beams") or 1)
    top_k = 50 if both.get("top_k") is None else both["top_k"]
    alpha = both.get("penalty_alpha")
    contrastive = isinstance(alpha, int | float) and alpha > 0 and isinstance(top_k, int) and top_k > 1
    if contrastive and beams == 1 and not both.get("do_sample"):
        reasons["penalty_alpha"] = f"contrastive search: {_HUB}"
    if int(both.get("num_beam_groups") or 1) > 1 and beams > 1:
        reasons["num_beam_groups"] = f"groups of beams: {_HUB}"
    for key in ("dola_layers", "constraints", "force_words_ids"):
        if both.get(key) is not None:
            reasons[key] = _HUB
    if int(both.get("num_return_sequences") or 1) > 1:
        reasons["num_return_sequences"] = "a request has one answer (lm_eval asks for several by a task's `repeats`)"
    if both.get("token_healing"):
        reasons["token_healing"] = "it replaces the last tokens of a prompt, and lm_eval's hf does not generate with it"
    if quantizes_kv and both.get("guidance_scale") not in (None, 1):
        reasons["guidance_scale"] = "its second pass over the model has a KV cache of its own, which is not quantized"
    if options.get("stop_strings") is not None:
        reasons["stop_strings"] = "lm_eval names stop strings by until=..."
    for key, reason in reasons.items():
        if options.get(key) is not None:
            raise ConfigError(f"{key}={both[key]!r} among the generation options: {reason}; leave it out")
        raise ConfigError(
            f"{FILE}: {key}={both[key]!r}: {reason}; take it out of the file, or turn it off by --gen_kwargs {key}=None"
        )


@contextmanager
def refusals_explained(model: nn.Module, options: Mapping[str, Any]) -> Iterator[None]:
    """Raise ConfigError for what `generate` raises before it has run the model: a setting that it does not accept."""
    begun: list[bool] = []
    hook = model.register_forward_pre_hook(lambda *_: begun.append(True))
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        if begun:
            raise
        named = ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
        raise ConfigError(
            f"transformers' generate refuses the settings of this run: {str(error)[:400]} (of the generation options: "
            f"{named[:300]}; the others are of {FILE})"
        ) from error
    finally:
        hook.remove()
