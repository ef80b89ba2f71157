"""How a whole checkpoint is quantized, for the formats to write into its config."""

from typing import NamedTuple


class Scheme(NamedTuple):
    """bits, group_size (-1 per channel), symmetric; made_by: program and method; kept: layers in full precision.

    act_order: whether groups are of inputs in an order of their own.
    """

    bits: int
    group_size: int
    symmetric: bool
    made_by: str
    kept: tuple[str, ...] = ("lm_head",)
    act_order: bool = False
