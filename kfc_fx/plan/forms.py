"""Forms of a block's factors: dense, separable into offsets and channels, or diagonal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kfc_fx.plan import spec
from kfc_fx.plan.spec import BlockSpec

InputFactor = Literal["dense", "separable", "diagonal"]
OutputFactor = Literal["dense", "diagonal", "absent"]
"""Absent where a scaling needs Ω alone: then no statistic needs a cotangent."""
InputFactorOption = Literal["auto", "dense", "separable"]

DENSE_LIMIT = 1024
"""With "auto", a convolution whose dense Ω is wider than this takes a separable factor, which
trains a little less well, and costs a small part of it (figures: ``docs/measurements``)."""


@dataclass(frozen=True)
class FactorForms:
    """The forms of the two factors of a block."""

    input: InputFactor = "dense"
    output: OutputFactor = "dense"
    input_parts: int = 1
    """Diagonal blocks of equal side that a dense Ω is cut into; its bias column is apart then."""
    output_parts: int = 1
    """Those that a dense Γ is cut into."""


def factor_forms(block: BlockSpec, option: InputFactorOption = "auto") -> FactorForms:
    """The forms that ``block`` takes."""
    output: OutputFactor = "diagonal" if block.has_diagonal_output else "dense"
    return FactorForms(_input_form(block, option), output)


def cut(block: BlockSpec, forms: FactorForms, limit: int) -> FactorForms:
    """``forms`` with dense factors wider than ``limit`` in parts, where their sides have a divisor
    that fits: channels that stand apart in two parts are taken as uncorrelated.

    Of Ω where it has no offsets. The rows of one channel in Γ, the offsets of a transposed
    convolution, stay together.
    """
    if not block.layer.is_cut:
        return forms
    dense_input = forms.input == "dense" and block.offsets == 1
    dense_output = forms.output == "dense"
    return replace(
        forms,
        input_parts=parts_of(block.channels, limit) if dense_input else 1,
        output_parts=parts_of(block.rows, limit, block.rows_of_channel) if dense_output else 1,
    )


def parts_of(side: int, limit: int, unit: int = 1) -> int:
    """Fewest equal parts of at most ``limit``; one where these were under a quarter of it.

    Args:
        unit: what a part has a multiple of, where need be one that is over the limit.
    """
    units = side // unit
    fitting = (k for k in range(1, units + 1) if units % k == 0 and side // k <= limit)
    parts = next(fitting, units)
    return parts if side // parts >= limit / 4 else 1


def takes_matrix_step(block: BlockSpec) -> bool:
    """Whether the block's parameters are a matrix that maps inputs to outputs, both sides narrow
    enough for products of that size: neither a table of embeddings nor a norm."""
    diagonal = block.has_diagonal_input or block.has_diagonal_output
    return block.layer.is_matrix and not diagonal


def too_wide(block: BlockSpec) -> str | None:
    """Why a block has no factors: a side beyond the limit for which there is no diagonal form."""
    sides = {
        "Ω": 0 if block.has_diagonal_input else block.channels,
        "Γ": 0 if block.has_diagonal_output else block.rows,
    }
    for factor, side in sides.items():
        if side > spec.FACTOR_LIMIT:
            return f"{factor} has side {side}, which exceeds the limit of {spec.FACTOR_LIMIT}"
    return None


def _input_form(block: BlockSpec, option: InputFactorOption) -> InputFactor:
    if block.has_diagonal_input:
        return "diagonal"
    if block.offsets == 1:
        return "dense"
    if option == "dense":
        return "dense" if block.columns <= spec.FACTOR_LIMIT else "separable"
    if option == "separable" or block.columns > DENSE_LIMIT:
        return "separable"
    return "dense"


def quadratic_statistic(block: BlockSpec) -> str:
    """The statistic that is quadratic in the cotangent; the others do not depend on it."""
    return block.layer.quadratic


def statistic_shapes(block: BlockSpec, forms: FactorForms) -> dict[str, tuple[int, int, int]]:
    """Shape of each statistic that a site of the block emits, in the order of its probes.

    A diagonal factor is a row of Ω, ``[groups, 1, columns]``, or a column of Γ. A factor that is
    cut into k parts has k matrices in place of one: ``[groups · k, side / k, side / k]``.
    """
    groups, rows, columns = block.groups, block.rows, block.columns
    if forms.input == "separable":
        shapes = {
            "channel": (groups, block.channels, block.channels),
            "offset": (groups, block.offsets, block.offsets),
        }
    elif forms.input_parts > 1:
        side = block.channels // forms.input_parts
        shapes = {"omega": (groups * forms.input_parts, side, side)}
    else:
        shapes = {"omega": (groups, 1 if forms.input == "diagonal" else columns, columns)}
    if forms.output != "absent":
        groups, rows = groups * forms.output_parts, rows // forms.output_parts
        shapes["gamma"] = (groups, rows, 1 if forms.output == "diagonal" else rows)
    return shapes
