"""Generate how scaled gradients move towards their polar factors.

That takes the Gram matrix of a gradient's lesser side alone. All of one side are multiplied
together, pointwise work on all sides goes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from kfc_fx.codegen.pieces.bases import bases_of
from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.matrices import transposed
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import Value
from kfc_fx.linalg.polar import orthogonalisers
from kfc_fx.linalg.precision import LEAST_IN_BFLOAT16, has_fast_bfloat16
from kfc_fx.plan.forms import takes_matrix_step


def is_orthogonalised(stack: StackSpec) -> bool:
    """Whether the entries of a stack are matrices: neither tables nor norms nor vectors."""
    return takes_matrix_step(stack.first) and _side(stack) > 1


def orthogonalised(
    context: Context, stacks: Sequence[StackSpec], values: Value
) -> list[tuple[Value, dict[str, Value]]]:
    """Each matrix X of a list moved towards its polar factor, at its own Frobenius norm.

    That is ``M X``, or ``X M`` of a tall X. Where the side has one basis Q, by which X is rotated
    back anyway, ``Q M`` takes its place, a product of that side alone.

    Args:
        values: a list, one entry ``[depth, rows, columns]`` for each stack.

    Returns:
        For each stack the matrix, and the bases to rotate it back by.
    """
    groups: dict[object, dict[int, list[int]]] = {}
    for index, stack in enumerate(stacks):
        if is_orthogonalised(stack):
            sides = groups.setdefault(shared(stack), {})
            sides.setdefault(_side(stack), []).append(index)
    found: dict[int, tuple[Value, dict[str, Value]]] = {}
    for number, sides in enumerate(groups.values()):
        suffix = f"_{number}" if number else ""  # of another device or dtype
        found |= _orthogonalised(context, stacks, values, list(sides.values()), suffix)
    return [
        found[index] if index in found else (values[index], bases_of(context, stack))
        for index, stack in enumerate(stacks)
    ]


def _orthogonalised(
    context: Context,
    stacks: Sequence[StackSpec],
    values: Value,
    sides: Sequence[Sequence[int]],
    suffix: str,
) -> dict[int, tuple[Value, dict[str, Value]]]:
    """By index of a stack; ``sides`` has the indices of those that share a side."""
    update = context.update
    members = [index for side in sides for index in side]
    count = sum(stacks[index].depth for index in members)
    many = "1 matrix" if count == 1 else f"{count} matrices"
    update.section(f"towards the polar factors of {many}")
    scaled = {}
    for index in members:
        stack = stacks[index]
        scaled[index] = update.let(f"scaled_{stack.key}", values[index], stack.matrix_shape)
    grams = []
    for side in sides:
        parts = [_gram(scaled[index], stacks[index]) for index in side]
        grams.append(parts[0] if len(parts) == 1 else update.call(torch.cat, parts))
    share = context.option("orthogonalise", stacks[members[0]])
    precision = _precision(stacks[index] for index in members)
    towards = update.call(orthogonalisers, grams, share, *precision)
    towards = update.let_list(f"towards_polar{suffix}", towards)
    found = {}
    for place, side in enumerate(sides):
        parts = [towards[place]]
        if len(side) > 1:
            name = f"towards_polar_{_side(stacks[side[0]])}{suffix}"
            split = towards[place].split([stacks[index].depth for index in side])
            split = update.let(name, split)
            parts = [split[number] for number in range(len(side))]
        for index, part in zip(side, parts, strict=True):
            found[index] = _moved(context, stacks[index], scaled[index], part)
    return found


def _moved(
    context: Context, stack: StackSpec, matrix: Value, part: Value
) -> tuple[Value, dict[str, Value]]:
    update, bases = context.update, bases_of(context, stack)
    factor = "omega" if _is_tall(stack) else "gamma"
    if factor in bases and stack.parts[factor] == 1:
        both = update.let(f"both_{stack.key}", bases[factor] @ part, stack.basis_shapes[factor])
        return matrix, bases | {factor: both}
    turned = matrix @ part if _is_tall(stack) else part @ matrix
    return update.let(f"orthogonal_{stack.key}", turned, stack.matrix_shape), bases


def shared(stack: StackSpec) -> object:
    """What stacks have in common that go together."""
    return stack.device, stack.dtype


def _precision(stacks: Iterable[StackSpec]) -> list[torch.dtype]:
    """That of the iteration, if not the stacks' own."""
    widest = max(stacks, key=_side)
    fast = widest.dtype == "float32" and has_fast_bfloat16(widest.device)
    return [torch.bfloat16] if fast and _side(widest) >= LEAST_IN_BFLOAT16 else []


def _side(stack: StackSpec) -> int:
    return min(stack.matrix_shape[1:])


def _is_tall(stack: StackSpec) -> bool:
    return stack.matrix_shape[1] > stack.matrix_shape[2]


def _gram(matrix: Value, stack: StackSpec) -> Value:
    """Of the lesser side."""
    return transposed(matrix) @ matrix if _is_tall(stack) else matrix @ transposed(matrix)
