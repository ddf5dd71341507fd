"""The kinds of layers that have blocks, and what the plan knows of each.

A kind is an entry of :data:`KINDS`, a rule in ``statistics/rules/table.py`` that computes its
statistics, and a matcher in ``layer_calls.py`` or ``batched_calls.py`` that finds its calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

Shape = tuple[int, ...]
Diagonal = Literal["never", "wide", "always"]
"""When a factor is diagonal; "wide" is a side over ``spec.FACTOR_LIMIT``."""


@dataclass(frozen=True)
class Sides:
    """How many blocks a weight has, and the sizes of one."""

    groups: int
    """Blocks of the layer."""
    rows: int
    """Side of Γ."""
    channels: int
    """Side of Ω for one offset, without the bias."""
    offsets: int = 1
    """Kernel offsets |Δ| on the input side."""


def sides_of_matrix(shape: Shape, inputs_first: bool, groups: int) -> Sides:
    """``[C_out, C_in/groups, *kernel]``, or ``[C_in, C_out/groups, *kernel]``, of which the kernel
    is on the output side."""
    first = shape[0] // groups
    if inputs_first:
        return Sides(groups, rows=prod(shape[1:]), channels=first)
    return Sides(groups, rows=first, channels=shape[1], offsets=prod(shape[2:]))


def sides_of_entries(shape: Shape, inputs_first: bool, _: int) -> Sides:
    """``[E, C_out, C_in]``, or ``[E, C_in, C_out]``: a block for each entry."""
    entries, rows, channels = shape
    if inputs_first:
        rows, channels = channels, rows
    return Sides(entries, rows, channels)


def sides_of_scale(shape: Shape, _: bool, __: int) -> Sides:
    """Any shape: a block for each element."""
    return Sides(prod(shape), rows=1, channels=1)


@dataclass(frozen=True)
class LayerKind:
    """What the plan knows of a kind of layer. The defaults are those of a convolution."""

    sides: Callable[[Shape, bool, int], Sides] = sides_of_matrix
    """From the weight's shape, whether its inputs come first, and the groups of the call."""
    is_matrix: bool = True
    """Whether the weight maps inputs to outputs; a table of embeddings and a scale do not."""
    is_norm: bool = False
    """Whether ``norm_layers=False`` makes it generic, which ``strict`` allows."""
    least_dimensions: int = 2
    """Dimensions that the weight has at least."""
    slices: Literal["none", "rows", "entries"] = "none"
    """What a call may read of the weight alone, along its first dimension: rows, which are
    projections then, or entries."""
    takes_sharing: bool = False
    """Whether ``weight_sharing`` says how the locations of an example are taken together."""
    takes_nested: bool = False
    """Whether its statistics are taken of nested tensors, whose rows stand one after the other."""
    sums_locations: bool = True
    """Whether Ω is a sum over the locations of an example, and not of one row for each."""
    counts_inputs: bool = False
    """Whether its locations are those of its input, and not of its output."""
    diagonal_input: Diagonal = "never"
    diagonal_output: Diagonal = "never"
    is_cut: bool = True
    """Whether dense factors over the ``basis_limit`` are cut into parts."""
    quadratic: Literal["omega", "gamma"] = "gamma"
    """The statistic that is quadratic in the cotangent; the others do not depend on it."""
    method: str = ""
    """How its Ω is computed, where no statistics op does that."""
    why: str = ""
    """Why its factors have their forms, where these are not a matter of size."""


LINEAR = LayerKind(
    slices="rows",
    takes_sharing=True,
    takes_nested=True,
    diagonal_input="wide",
    diagonal_output="wide",
)
CONVOLUTION = LayerKind()
TRANSPOSED_CONVOLUTION = LayerKind(counts_inputs=True)
BATCHED_LINEAR = LayerKind(
    sides=sides_of_entries, least_dimensions=3, slices="entries", is_cut=False
)
EMBEDDING = LayerKind(
    is_matrix=False,
    takes_nested=True,
    diagonal_input="always",
    method="counts",
    why="one-hot rows: Ω is diagonal, the tokens' frequencies",
)
SCALE_SHIFT = LayerKind(
    sides=sides_of_scale,
    is_matrix=False,
    is_norm=True,
    least_dimensions=1,
    sums_locations=False,
    diagonal_output="always",
    is_cut=False,
    quadratic="omega",
    method="moments",
    why="the exact Fisher matrix of each channel's scale and shift",
)

KINDS: dict[str, LayerKind] = {
    "linear": LINEAR,
    "batched_linear": BATCHED_LINEAR,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), CONVOLUTION),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), TRANSPOSED_CONVOLUTION
    ),
    "embedding": EMBEDDING,
    "scale_shift": SCALE_SHIFT,
}
"""Every kind by the name that blocks, sites and emissions call it."""
