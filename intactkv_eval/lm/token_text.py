"""TokenText: a text with the exact tokens that it stands for.

Tasks that are defined on tokens (perplexity windows) hand it to lm_eval as the string it wants; IntactKVLM scores the
tokens, any other model class the text. Knows nothing of models.
"""

from collections.abc import Sequence


class TokenText(str):
    """`text`, and its `ids`. Equal to and hashed as the text."""

    ids: tuple[int, ...]

    def __new__(cls, text: str, ids: Sequence[int]) -> "TokenText":
        """A string cannot take a second argument in __init__."""
        made = super().__new__(cls, text)
        made.ids = tuple(ids)
        return made

    def __reduce__(self) -> tuple[type["TokenText"], tuple[str, tuple[int, ...]]]:
        return TokenText, (str(self), self.ids)
