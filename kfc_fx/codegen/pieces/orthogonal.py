"""Generate how scaled gradients move towards their polar factors.

Only the Gram matrix of a gradient's shorter side is needed. All of one side are multiplied
together, pointwise work on all sides goes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch.nn.functional import pad

from kfc_fx.codegen.pieces.bases import bases_of
from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.matrices import (
    from_row_parts,
    in_row_parts,
    rotate_output,
    transposed,
)
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.polar import orthogonalizers
from kfc_fx.linalg.precision import LEAST_IN_BFLOAT16, has_fast_bfloat16
from kfc_fx.plan.forms import takes_matrix_step

PADDED = 96
"""Side up to which matrices are padded to go with others: a product takes less time there than what
is around it, more so on a GPU."""
NEAR, SMALL = 0.9, 16
"""They go with others whose side is so near, or that are so small."""
FEW = 2**15
"""Numbers of padded matrices of a stack up to which they do: the depthwise filters of a layer are
hundreds."""


def is_orthogonalized(stack: StackSpec) -> bool:
    """Whether the entries of a stack are matrices: neither tables nor norms nor vectors."""
    return takes_matrix_step(stack.first) and _side(stack) > 1


def towards_polar(
    context: Context, stacks: Sequence[StackSpec], values: Sequence[Value]
) -> dict[str, Value]:
    """What moves matrices towards their polar factors, at their own Frobenius norms.

    That is M ``[depth, side, side]`` of a stack, such that ``M X``, or ``X M`` of a tall X, is X
    moved.

    Args:
        values: X of each stack, ``stack.polar_shape``.

    Returns:
        M by the key of each stack whose entries are matrices.
    """
    groups: dict[object, list[int]] = {}
    for index, stack in enumerate(stacks):
        if is_orthogonalized(stack):
            groups.setdefault(shared(stack), []).append(index)
    found: dict[str, Value] = {}
    for number, members in enumerate(groups.values()):
        suffix = f"_{number}" if number else ""  # of another device or dtype
        sides = _sides_together(stacks, members)
        found |= _of_one_place(context, stacks, values, sides, suffix)
    return found


def _sides_together(stacks: Sequence[StackSpec], members: Sequence[int]) -> dict[int, list[int]]:
    """Stacks whose matrices go together, by their side, which narrower ones are padded to."""
    found: dict[int, list[int]] = {}
    widest = 0
    for index in sorted(members, key=lambda index: -_side(stacks[index])):
        side = _side(stacks[index])
        near = 0 < widest < PADDED and (side >= NEAR * widest or widest <= SMALL)
        few = stacks[index].polar_shape[0] * widest**2 <= FEW
        if side != widest and not (near and few):
            widest = side
        found.setdefault(widest, []).append(index)
    return {side: sorted(indices) for side, indices in found.items()}


def _of_one_place(
    context: Context,
    stacks: Sequence[StackSpec],
    values: Sequence[Value],
    sides: dict[int, list[int]],
    suffix: str,
) -> dict[str, Value]:
    """M by key, of stacks on one device; ``sides`` has the indices of those that go together by
    their side."""
    update = context.update
    members = [index for side in sides.values() for index in side]
    count = sum(stacks[index].polar_shape[0] for index in members)
    many = "1 matrix" if count == 1 else f"{count} matrices"
    padded = any(_side(stacks[index]) < width for width, side in sides.items() for index in side)
    update.section(
        f"towards the polar factors of {many}, those of one shorter side together"
        + ", padded where it is nearly one" * padded
    )
    grams = []
    for width, side in sides.items():
        parts = [_gram(update, values[index], stacks[index], width) for index in side]
        grams.append(parts[0] if len(parts) == 1 else update.call(torch.cat, parts))
    share = context.option("orthogonalize", stacks[members[0]])
    precision = _precision(stacks[index] for index in members)
    towards = update.call(orthogonalizers, grams, share, *precision)
    towards = update.let(f"towards_polar{suffix}", towards)
    found: dict[str, Value] = {}
    for place, (width, side) in enumerate(sides.items()):
        parts = [towards[place]]
        if len(side) > 1:
            split = towards[place].split([stacks[index].polar_shape[0] for index in side])
            split = update.let(f"towards_polar_{width}{suffix}", split)
            parts = [split[number] for number in range(len(side))]
        for index, part in zip(side, parts, strict=True):
            own = _side(stacks[index])
            found[stacks[index].key] = part if own == width else part[:, :own, :own]
    return found


def parted(local: StackContext, matrix: Value) -> Value:
    """The matrices that have a polar factor each, ``stack.polar_shape``: of a matrix in the
    eigenbases, whose rows are turned back for it, since those of a basis mix all parts."""
    gamma = {name: basis for name, basis in bases_of(local).items() if name == "gamma"}
    return in_row_parts(local.stack, rotate_output(local, gamma, matrix, back=True))


def moved(local: StackContext, matrix: Value, towards: Value) -> tuple[Value, dict[str, Value]]:
    """A matrix of a stack moved by M, and the bases to rotate it back by.

    The rows of one that was :func:`parted` are turned back already. Of others, where the side has
    one basis Q, by which the matrix is rotated back anyway, ``Q M`` takes its place, a product of
    that side alone.
    """
    bases, tall = bases_of(local), _is_tall(local.stack)
    factor = "omega" if tall else "gamma"
    if local.stack.row_parts > 1:
        matrix = matrix @ towards if tall else towards @ matrix
        matrix = local.let("moved", from_row_parts(local.stack, matrix))
        return matrix, {name: basis for name, basis in bases.items() if name != "gamma"}
    if factor in bases and local.stack.parts[factor] == 1:
        shape = local.stack.basis_shapes[factor]
        both = local.update.let("moved_basis", bases[factor] @ towards, shape)
        return matrix, bases | {factor: both}
    return local.let("moved", matrix @ towards if tall else towards @ matrix), bases


def shared(stack: StackSpec) -> object:
    """What stacks have in common that go together."""
    return stack.device, stack.dtype


def _precision(stacks: Iterable[StackSpec]) -> list[torch.dtype]:
    """That of the iteration, if not the stacks' own."""
    widest = max(stacks, key=_side)
    fast = widest.dtype == "float32" and has_fast_bfloat16(widest.device)
    return [torch.bfloat16] if fast and _side(widest) >= LEAST_IN_BFLOAT16 else []


def _side(stack: StackSpec) -> int:
    return min(stack.polar_shape[1:])


def _is_tall(stack: StackSpec) -> bool:
    return stack.polar_shape[1] > stack.polar_shape[2]


def _gram(update: UpdateGraph, matrix: Value, stack: StackSpec, width: int) -> Value:
    """Of the shorter side, with rows and columns of zeros where that is not the width."""
    gram = transposed(matrix) @ matrix if _is_tall(stack) else matrix @ transposed(matrix)
    missing = width - _side(stack)
    return update.call(pad, gram, (0, missing, 0, missing)) if missing else gram
