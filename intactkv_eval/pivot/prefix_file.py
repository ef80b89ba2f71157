"""A chosen prefix with its evidence, as JSON: what `intactkv pivots --out` writes and pivot=FILE.json reads."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from intactkv_eval.errors import PivotError
from intactkv_eval.pivot.prefix_choice import PrefixChoice
from intactkv_eval.storage.documents import parse_json
from intactkv_eval.storage.files import write_atomic
from intactkv_eval.storage.limits import read_bytes

FORMAT = "intactkv-prefix-2"


class Searched(BaseModel):
    """On what a prefix was searched: texts, and the settings of the search."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    weight_hash: str
    dtype: str
    samples: dict[str, Any]
    threshold: float
    max_prefix_tokens: int
    min_reduction: float


class PrefixFile(BaseModel):
    """tokens: the prefix; text: their words; evidence: what was measured on texts that it was not chosen on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str = FORMAT
    tokens: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    text: tuple[str, ...]
    searched: Searched
    choice: PrefixChoice

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Raises OSError as the file system does."""
        content = self.model_dump_json(indent=1) + "\n"
        write_atomic(path, lambda partial: partial.write_text(content, encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> "PrefixFile":
        """Read what `save` wrote. Raises PivotError for a missing, damaged or foreign file."""
        if not path.is_file():
            raise PivotError(f"pivot file {path} does not exist")
        try:
            found = cls.model_validate(parse_json(read_bytes(path)))
        except ValueError as error:  # pydantic's among them
            raise PivotError(f"{path} is no prefix that `intactkv pivots --out` wrote ({error})") from None
        if found.format != FORMAT or not found.tokens:
            raise PivotError(f"{path}: format {found.format!r}, expected {FORMAT!r}; search anew: intactkv pivots")
        return found
