"""Which tokens are the pivot: BOS, a chat prompt's constant head, a list or a file. Knows tokenizers, no models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intactkv_eval.cell.spec import PivotSpec
from intactkv_eval.chat.bos_text import encoded_prompt
from intactkv_eval.chat.sandbox import prompts_of
from intactkv_eval.chat.templates import ChatSettings
from intactkv_eval.errors import ConfigError, PivotError
from intactkv_eval.pivot.prefix_file import PrefixFile
from intactkv_eval.storage.files import read_text, shipped_folder

# First user messages that begin in unlike ways: what their prompts have in common is the constant head.
_PROBES = ("Hello there", "What is 7 times 8?", "12 apples cost", "(a parenthesis)", "über", "the end", "I am")


def resolve_tokens(
    spec: PivotSpec, tokenizer: Any, vocab_size: int, chat: ChatSettings | None = None
) -> tuple[int, ...]:
    """The pivot tokens of `spec` with this tokenizer. Empty for an intact=false `bos` on a model that has no BOS.

    chat: how the chat template is rendered.
    Raises PivotError where the tokenizer has no BOS or no chat template, or an id is outside the vocabulary; and for
    `auto` and PivotKV files, whose tokens no tokenizer tells.
    """
    if spec.kind in {"auto", "kv_file"}:
        raise PivotError(f"pivot={spec.source}: cannot be told here; name its tokens with tokens:ID+ID+...")
    if spec.token_ids is not None:
        check_vocabulary(spec.token_ids, vocab_size)
        return spec.token_ids
    if spec.kind == "prompt":
        return prompt_head(tokenizer, chat)
    if spec.kind == "prefix_file":
        chosen = PrefixFile.load(Path(spec.source)).tokens
        check_vocabulary(chosen, vocab_size)
        return chosen
    if tokenizer.bos_token_id is not None:
        return (int(tokenizer.bos_token_id),)
    if not spec.intact:
        return ()
    raise PivotError(
        "pivot=bos: this tokenizer has no BOS token, and none will be made up. Name the token that should stand in "
        f"front, for instance pivot=tokens:{tokenizer.eos_token_id} ({tokenizer.eos_token!r}), with the baseline "
        "pivot=tokens:...,intact=false; or use pivot=prompt"
    )


def prompt_head(
    tokenizer: Any, chat: ChatSettings | None = None, encode: Callable[[Any, str], list[int]] = encoded_prompt
) -> tuple[int, ...]:
    """The tokens that every prompt of the tokenizer's chat template begins with, up to the first user message.

    The prompts are tokenized whole, so the head holds no token that a message could change.
    chat: how it is rendered. encode: the tokens of a prompt. Raises PivotError where there is no template, or no such
    head.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise PivotError("pivot=prompt: this tokenizer has no chat template; name one: chat_template=vicuna_v1.1")
    encoded = [encode(tokenizer, prompt) for prompt in prompts_of(tokenizer, _PROBES, chat or ChatSettings())]
    shortest = min(len(tokens) for tokens in encoded)
    length = next((i for i in range(shortest) if len({tokens[i] for tokens in encoded}) > 1), shortest)
    if not length:
        raise PivotError("pivot=prompt: the prompts of this chat template begin with no common token; use tokens:...")
    return tuple(encoded[0][:length])


def use_chat_template(tokenizer: Any, name: str) -> None:
    """Give `tokenizer` a template of model_configs/chat_templates, or a .jinja file. Raises ConfigError if unknown."""
    folder = shipped_folder("model_configs") / "chat_templates"
    path = Path(name) if name.endswith(".jinja") else folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise ConfigError(f"chat_template={name!r}: no such file; shipped templates: {known}")
    tokenizer.chat_template = read_text(path)


def opens_messages(tokenizer: Any, token: int, chat: ChatSettings) -> bool:
    """Whether prompts of the chat template hold `token` more than once around a single message, as ChatML's do."""
    if not getattr(tokenizer, "chat_template", None):
        return False
    try:
        prompts = prompts_of(tokenizer, _PROBES[:1], chat)
    except PivotError:
        return False  # no chat prompt is made with such a template
    return encoded_prompt(tokenizer, prompts[0]).count(token) > 1


def check_vocabulary(token_ids: tuple[int, ...], vocab_size: int) -> None:
    """Raise PivotError for a token that the model has no embedding of."""
    outside = [token for token in token_ids if token >= vocab_size]
    if outside:
        raise PivotError(f"pivot tokens {outside} are outside the model's vocabulary of {vocab_size}")
