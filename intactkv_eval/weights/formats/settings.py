"""What a foreign config may hold, by format: the types of what we read of it. The rest of it is let alone.

A config is a stranger's: a value of another type is refused with its name before anything is computed from it.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from intactkv_eval.errors import CheckpointError
from intactkv_eval.weights.formats.patterns import check_pattern


def _positive(size: int) -> int:
    if size == 0:
        raise ValueError("0 inputs in a group; expected a positive number, or -1 for one group")
    return size


GroupSize = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(_positive)]
Pattern = Annotated[str, AfterValidator(check_pattern)]


class _Settings(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class _Meta(_Settings):
    quantizer: str | list[str] | None = None


class GPTQSettings(_Settings):
    """Of GPTQ checkpoints; also of one module, overrides laid over."""

    group_size: GroupSize = 128
    sym: bool | None = True
    desc_act: bool | None = False
    static_groups: bool | None = False
    checkpoint_format: str = "gptq"
    pack_dtype: str = "int32"
    dynamic: dict[Pattern, dict[str, Any]] | None = None
    meta: _Meta | None = None


class AWQSettings(_Settings):
    """Of AWQ checkpoints."""

    group_size: GroupSize = 128
    zero_point: bool | None = True


class _Weights(_Settings):
    strategy: str | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = True
    actorder: str | bool | None = None


class _Group(_Settings):
    targets: list[Pattern] | None = Field(default_factory=list)
    weights: _Weights
    format: str | None = None


class CompressedTensorsSettings(_Settings):
    """Of compressed-tensors checkpoints."""

    config_groups: dict[str, _Group]


def check_settings(kind: type[BaseModel], config: Mapping[str, Any], source: str = "quantization_config") -> None:
    """Raise CheckpointError, by name, for a value whose type is not the one that is read."""
    try:
        kind.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{source}: {name} is {str(first['input'])[:80]!r}: {first['msg']}") from None
