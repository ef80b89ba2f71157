"""BOS that a chat template writes as text, and BOS that the tokenizer adds itself: one token id, unlike neighbours.

Llama's tokenizers with `legacy: false` (Vicuna 1.5, Llama 2) put a space in front of a text, but not behind a BOS that
is written into it: of "<s>A chat" they make "A", and of "A chat", to which they add BOS themselves, "▁A". FastChat and
IntactKV's released code write no BOS and let the tokenizer add it. So a text that begins with BOS is tokenized here as
what stands behind it, with the id in front, wherever the tokenizer would add that BOS itself. Knows tokenizers alone.
"""

from functools import cache
from typing import Any

from intactkv_eval.storage.files import read_text, shipped_folder

_PROBES = ("A chat", "[INST] x", "<|user|>", "hello")


def encoded_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt: one that begins with BOS as text has that BOS once, as the tokenizer adds it.

    A second BOS that is written behind the first is text, and stays.
    """
    if splits_bos(tokenizer, prompt):
        rest: list[int] = tokenizer.encode(prompt[len(tokenizer.bos_token) :], add_special_tokens=False)
        return [tokenizer.bos_token_id, *rest]
    return encoded_as_text(tokenizer, prompt)


def encoded_with_places(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """The tokens of `encoded_prompt`, and the place in `prompt` of each one's first character.

    The tokenizer must be a fast one, which tells where its tokens lie.
    """
    if not splits_bos(tokenizer, prompt):
        whole = tokenizer(prompt, return_offsets_mapping=True, verbose=False, **_special(tokenizer, prompt))
        return whole.input_ids, [first for first, _ in whole.offset_mapping]
    cut = len(tokenizer.bos_token)
    rest = tokenizer(prompt[cut:], return_offsets_mapping=True, verbose=False, add_special_tokens=False)
    return [tokenizer.bos_token_id, *rest.input_ids], [0, *(cut + first for first, _ in rest.offset_mapping)]


def splits_bos(tokenizer: Any, text: str) -> bool:
    """Whether `text` begins with BOS as text, and the id is put in front of what stands behind it instead.

    It is where the tokenizer adds BOS itself, and for the shipped templates, whose released prompts hold no BOS.
    """
    bos = tokenizer.bos_token
    if not bos or not text.startswith(bos):
        return False
    template = getattr(tokenizer, "chat_template", None)
    return _adds_bos(tokenizer) or (isinstance(template, str) and template in _shipped())


def bos_changes_tokens(tokenizer: Any) -> bool:
    """Whether the tokens behind a BOS depend on who wrote it, so that revision 1 of the formula `chat` was another."""
    bos = tokenizer.bos_token
    return bool(bos) and any(
        splits_bos(tokenizer, bos + text)
        and encoded_prompt(tokenizer, bos + text) != encoded_as_text(tokenizer, bos + text)
        for text in _PROBES
    )


def encoded_as_text(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt whose BOS is text like the rest of it: revision 1 of the formula `chat`."""
    encoded: list[int] = tokenizer.encode(prompt, **_special(tokenizer, prompt))
    return encoded


def _adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts BOS in front of a text that has none."""
    own = [tokenizer.bos_token_id]
    return bool(tokenizer.encode("x")[:1] == own != tokenizer.encode("x", add_special_tokens=False)[:1])


def _special(tokenizer: Any, text: str) -> dict[str, bool]:
    """Of a text that begins with BOS, that it gets no second one."""
    bos = tokenizer.bos_token
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


@cache
def _shipped() -> frozenset[str]:
    """The texts of the shipped chat templates."""
    return frozenset(map(read_text, (shipped_folder("model_configs") / "chat_templates").glob("*.jinja")))
