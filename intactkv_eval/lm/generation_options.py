"""The generation options of a request: a task's generation_kwargs, and lm_eval's --gen_kwargs, which win over them.

Their names and values are checked before anything is generated, and those of a command line before a model is loaded.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from transformers import GenerationConfig, WatermarkingConfig

from intactkv_eval.errors import ConfigError, unknown_key
from intactkv_eval.inference.generation.settings import DROPPED, known_settings, served

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""lm_eval's names for the most new tokens; the first that is given counts."""

_OF_LM_EVAL = ("until", *LENGTHS)
_REFUSED = {
    "use_cache": "lm_eval's hf always generates with a KV cache",
    "pad_token_id": "what fills a batch is never part of an answer",
}
_NOTHING = (
    "bos_token_id", "decoder_start_token_id", "cache_config", "is_assistant", "continuous_batching_config",
    "disable_compile", "low_memory", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight",
)  # fmt: skip
_OTHER_KINDS = (
    "constraints", "dola_layers", "force_words_ids", "num_beam_groups", "diversity_penalty", "stop_strings",
    "token_healing", "num_return_sequences",
)  # fmt: skip  # which are never suggested
_OTHER_NAMES = {
    "stop": "until", "stop_sequences": "until", "stop_words": "until", "stop_token_ids": "eos_token_id",
    "eos": "eos_token_id", "beam_size": "num_beams", "beams": "num_beams", "n": "num_return_sequences",
    "temp": "temperature", "sample": "do_sample", "n_predict": "max_gen_toks", "num_predict": "max_gen_toks",
}  # fmt: skip


class _Kind(NamedTuple):
    """kind: of the value, whole numbers among the floats. least, most: the bounds. above: whether `least` is none."""

    kind: type
    words: str
    least: float = 0
    most: float = float("inf")
    above: bool = False

    def holds(self, value: Any) -> bool:
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        kinds = (int,) if self.kind is int else (int, float)
        return (
            isinstance(value, kinds) and self.least <= value <= self.most and not (self.above and value == self.least)
        )


class _Tokens(NamedTuple):
    """Token ids: a list of them, or, where `alone`, one."""

    words: str
    alone: bool

    def holds(self, value: Any) -> bool:
        ids = value if isinstance(value, list) else [value] if self.alone else [None]
        return all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids)


_FROM_1 = _Kind(int, "a whole number from 1", least=1)
_FROM_0 = _Kind(int, "a whole number from 0")
_SHARE = _Kind(float, "a number from 0 to 1", most=1)
_OPEN_SHARE = _Kind(float, "a number above 0, at most 1", most=1, above=True)
_POSITIVE = _Kind(float, "a number above 0", above=True)
_ONE_OR_MORE = _Tokens("a token id, or a list of them", alone=True)
_KINDS: dict[str, _Kind | _Tokens] = {
    **dict.fromkeys((*LENGTHS, "max_length", "num_beams", "num_return_sequences", "num_beam_groups"), _FROM_1),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k"), _FROM_0),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _FROM_0),
    **dict.fromkeys(("top_p", "min_p", "epsilon_cutoff", "eta_cutoff"), _SHARE),
    **dict.fromkeys(("typical_p", "top_h"), _OPEN_SHARE),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), _POSITIVE),
    "temperature": _Kind(float, "a number from 0"),
    "penalty_alpha": _Kind(float, "a number from 0"),
    "length_penalty": _Kind(float, "a number", least=-float("inf")),
    "guidance_scale": _Kind(float, "a number", least=-float("inf")),
    **dict.fromkeys(("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"), _ONE_OR_MORE),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), _Tokens("a list of token ids", alone=False)),
    **dict.fromkeys(("do_sample", "renormalize_logits", "remove_invalid_values"), _Kind(bool, "true or false")),
}  # fmt: skip


def check_options(options: Mapping[str, Any], source: str = "--gen_kwargs") -> None:
    """Raise ConfigError for an option that nobody reads, or that `generate` would refuse.

    source: where the options are from, for the message.
    """
    settings = known_settings()
    offered = [key for key in (*_OF_LM_EVAL, *settings) if key not in {*_REFUSED, *_NOTHING, *_OTHER_KINDS, *DROPPED}]
    for key, value in options.items():
        if key in _REFUSED or key in _NOTHING:
            reason = _REFUSED.get(key, "it does nothing here")
            raise ConfigError(f"{source}: {key}={value!r}: {reason}; leave it out")
        if key not in {*offered, *_OTHER_KINDS, *DROPPED}:
            if key in _OTHER_NAMES:
                raise ConfigError(f"{source}: unknown argument {key!r}: did you mean {_OTHER_NAMES[key]!r}?")
            raise ConfigError(f"{source}: {unknown_key(key, offered)}")
        kind = _KINDS.get(key)
        if kind is not None and not (value is None and key != "temperature") and not kind.holds(value):
            raise ConfigError(f"{source}: {key}={value!r}: expected {kind.words}")
    _check_until(options.get("until", []), source)
    if options.get("do_sample") and options.get("temperature") == 0:
        raise ConfigError(f"{source}: do_sample=True with temperature=0: sampling needs a temperature above 0")
    own = {key: value for key, value in options.items() if key in settings and key not in LENGTHS}
    try:
        own = for_generate(own)
        served(GenerationConfig(), own)
        GenerationConfig(**{key: value for key, value in own.items() if value is not None}).validate()
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{source}: transformers' generate refuses {own}: {str(error)[:300]}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_until(until: Any, source: str) -> None:
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ConfigError(f"{source}: until={until!r}: expected a text, or a list of texts")


def for_generate(options: Mapping[str, Any]) -> dict[str, Any]:
    """The same in the types that every release of transformers takes: floats, and the object of a watermark."""
    floats = {key for key, kind in _KINDS.items() if isinstance(kind, _Kind) and kind.kind is float}
    out: dict[str, Any] = {
        key: float(value) if key in floats and value is not None else value for key, value in options.items()
    }
    if isinstance(out.get("watermarking_config"), dict):
        out["watermarking_config"] = WatermarkingConfig(**out["watermarking_config"])
    return out
