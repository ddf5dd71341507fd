"""Form of a block's input factor: dense Ω, or separable into offsets and channels."""

from __future__ import annotations

from typing import Literal, get_args

from kfc_fx.errors import OptionError
from kfc_fx.plan.spec import BlockSpec

InputFactor = Literal["dense", "separable"]
InputFactorOption = Literal["auto", "dense", "separable"]

DENSE_LIMIT = 1024
"""With "auto", a convolution whose dense Ω is wider than this takes a separable factor: the
eigendecomposition of a wider side costs more than the steps between two refreshes."""


def check_input_factor(option: str) -> None:
    """Raise :class:`OptionError` unless the option is a known one."""
    if option not in get_args(InputFactorOption):
        known = ", ".join(get_args(InputFactorOption))
        raise OptionError(f"input_factor must be one of {known}; got {option!r}")


def input_factor_form(block: BlockSpec, option: InputFactorOption = "auto") -> InputFactor:
    """The form that ``block`` takes. A block with one kernel offset is always dense."""
    if block.offsets == 1 or option == "dense":
        return "dense"
    if option == "separable" or block.columns > DENSE_LIMIT:
        return "separable"
    return "dense"


def statistic_shapes(block: BlockSpec, form: InputFactor) -> dict[str, tuple[int, int, int]]:
    """Shape of each statistic that a site of the block emits, in the order of its probes."""
    gamma = (block.groups, block.rows, block.rows)
    if form == "dense":
        return {"omega": (block.groups, block.columns, block.columns), "gamma": gamma}
    return {
        "channel": (block.groups, block.channels, block.channels),
        "offset": (block.groups, block.offsets, block.offsets),
        "gamma": gamma,
    }
