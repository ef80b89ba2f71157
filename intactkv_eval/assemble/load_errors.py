"""What transformers makes of a folder that it cannot load, as one message."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForImageTextToText, GenerationConfig, PretrainedConfig

from intactkv_eval.cell.trust import names_kernel
from intactkv_eval.compat.transformers_api import CONFIG_MAPPING, file_of, loads_as
from intactkv_eval.errors import CheckpointError, ConfigError, IntactKVError, UnsupportedModelError, panics_named
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.limits import LAYERS, TOKENIZER_BYTES, check_regular, read_bytes

_OURS = "intactkv_eval"
_LOADERS = {"lm_eval", "transformers", "tokenizers", "huggingface_hub", "safetensors"}

_SENTENCE = "Hello there, how are you?"
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
_READ = (".json", ".model", ".txt", ".jinja", ".tiktoken", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".py")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


def check_folder(pretrained: str) -> None:
    """Raise CheckpointError for a model's folder with a pipe, a device or a very large file where loaders read one.

    They would wait, or read without an end. Links to files are followed: the hub's cache is made of them. What is no
    folder is left to transformers.
    """
    if not Path(pretrained).is_dir():
        return
    for entry in os.scandir(pretrained):
        if entry.name.endswith(_READ) and not entry.is_dir():
            try:
                check_regular(Path(entry.path), None if entry.name.endswith(_WEIGHTS) else TOKENIZER_BYTES)
            except FileNotFoundError:
                continue  # a link that leads nowhere is no file to a loader
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{entry.path}: {error}") from None


def check_no_adapter(pretrained: str) -> None:
    """Raise ConfigError for a folder that holds an adapter of peft and no model."""
    folder = Path(pretrained)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    base = parse_json(read_bytes(folder / "adapter_config.json"))
    name = base.get("base_model_name_or_path") if isinstance(base, dict) else None
    raise ConfigError(
        f"pretrained={pretrained}: the folder holds an adapter of peft, and no model: name the model that it belongs "
        f"to with pretrained={name or '...'}, and the adapter with peft={pretrained}"
    )


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raises ConfigError for what is not there or not loadable, CheckpointError for files that are damaged.

    A config or a tokenizer that is damaged makes transformers fail with whatever it meets first; a fault of ours, or
    memory that runs out, is passed on as it is.
    """
    try:
        with panics_named(what):
            yield
    except (IntactKVError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise CheckpointError(f"{what}: a weight file is damaged ({error})") from error
    except (OSError, ValueError) as error:
        text = str(error).partition("Model type should be one of")[0]  # 150 names follow
        raise ConfigError(f"{what} cannot be loaded: {text}") from error
    except Exception as error:
        if _innermost(error.__traceback__) == _OURS:
            raise
        raise CheckpointError(f"{what}: its files cannot be loaded ({type(error).__name__}: {error})") from error


def auto_class_of(pretrained: str, config: PretrainedConfig) -> Any:
    """The auto class that loads a language model which is wrapped beside a vision tower, None where lm_eval's is right.

    Raises UnsupportedModelError for what is no language model: transformers itself lists 150 others.
    """
    classes = loads_as(config)
    if {"AutoModelForCausalLM", "AutoModelForSeq2SeqLM"} & set(classes):
        return None
    if "AutoModelForImageTextToText" in classes:
        return AutoModelForImageTextToText
    raise UnsupportedModelError(
        f"pretrained={pretrained!r} is of type {config.model_type}, which transformers does not load as a language "
        "model (AutoModelForCausalLM, AutoModelForImageTextToText); name a decoder-only language model"
    )


def check_no_kernel(pretrained: str, revision: str, chosen: object = None) -> None:
    """Raise CheckpointError for a config.json that names a kernel of the hub for its attention or experts.

    transformers would load that kernel, which is compiled code. chosen: the attention of the command line, which counts
    instead of the file's.
    """
    found: dict[str, Any] = {}
    with suppress(OSError):
        found, _ = PretrainedConfig.get_config_dict(pretrained, revision=revision)
    for part in (found, *found.values()):
        for key, value in part.items() if isinstance(part, dict) else ():
            if names_kernel(str(key), value) and not (chosen and "attn" in str(key)):
                raise CheckpointError(
                    f"{pretrained}: config.json says {key}={str(value)[:80]}, a kernel of the hub, which is code that "
                    "would be loaded and run. Remove the line from config.json; if you trust that kernel, give "
                    "attn_implementation=... among --model_args"
                )


def check_layers(pretrained: str, revision: str) -> None:
    """Raise CheckpointError for a config whose layers no model has.

    That is more layers than any, which transformers would begin to build, or sliding layers without a window, which
    transformers builds and then cannot run. What has no config.json is left to transformers.
    """
    found: dict[str, Any] = {}
    with suppress(OSError):
        found, _ = PretrainedConfig.get_config_dict(pretrained, revision=revision)
    for part in (found, *found.values()):
        for key in _LAYERS if isinstance(part, dict) else ():
            if isinstance(part.get(key), int | float) and part[key] > LAYERS:
                raise CheckpointError(
                    f"{pretrained}: config.json says {key}={str(part[key])[:20]}; expected at most {LAYERS}"
                )
    if str(found.get("model_type")) in CONFIG_MAPPING:
        _check_window(pretrained, CONFIG_MAPPING[found["model_type"]].from_dict(found))


def _check_window(pretrained: str, config: PretrainedConfig) -> None:
    text = config.get_text_config(decoder=True)
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    slides = "sliding_attention" in kinds if isinstance(kinds, list | tuple) else window is not None
    if slides and not (isinstance(window, int) and 2 <= window < 2**31):  # of 1, transformers' cache keeps everything
        raise CheckpointError(
            f"{pretrained}: config.json says sliding_window={str(window)[:20]}, and has layers of sliding_attention; "
            "expected a whole number of 2 or more"
        )


def check_words(tokenizer: Any, name: str, revision: str) -> None:
    """Raise CheckpointError where transformers loses words that SentencePiece finds in a folder's tokenizer.model.

    Its releases before 5.3 do so for Llama's, as Vicuna ships it, without a word. A tokenizer.json is taken as it is.
    """
    if tokenizer.decode(tokenizer.encode(_SENTENCE, add_special_tokens=False)).strip() == _SENTENCE:
        return
    file = file_of(name, "tokenizer.model", revision)
    if file is None or file_of(name, "tokenizer.json", revision) is not None:
        return
    words = SentencePieceProcessor()
    try:
        words.Load(str(file))
    except (OSError, RuntimeError):
        return  # a file of tiktoken's has this name too
    if words.Decode(words.Encode(_SENTENCE)) == _SENTENCE:
        raise CheckpointError(
            f"{name}: transformers {version('transformers')} loses words of {_SENTENCE!r} that the folder's "
            "tokenizer.model has: install transformers from 5.3 on, or write a tokenizer.json beside it with "
            "LlamaTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )


def check_settings_file(pretrained: str, revision: str) -> None:
    """Raise ConfigError for a generation_config.json whose settings contradict each other, which transformers refuses.

    A checkpoint without one has no settings.
    """
    try:
        GenerationConfig.from_pretrained(pretrained, revision=revision)
    except OSError:
        return
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{pretrained}: generation_config.json: {error}; correct the file") from None


def _innermost(trace: TracebackType | None) -> str:
    """Which of the packages that take part was at work: the last of them on the way down."""
    found = _OURS
    while trace is not None:
        package = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0]
        found = package if package in {_OURS, *_LOADERS} else found
        trace = trace.tb_next
    return found
