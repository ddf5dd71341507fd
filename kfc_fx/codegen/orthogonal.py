"""Generate how scaled gradients move towards their polar factors.

That takes the Gram matrix of a gradient's lesser side alone, and all of one side go together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kfc_fx.codegen.bases import bases_of
from kfc_fx.codegen.context import Context
from kfc_fx.codegen.layout import StackSpec
from kfc_fx.codegen.matrices import transposed
from kfc_fx.codegen.update_graph import Value
from kfc_fx.curvature.polar import orthogonaliser
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
    update = context.update
    found: dict[int, tuple[Value, dict[str, Value]]] = {}
    groups: dict[object, list[int]] = {}
    for index, stack in enumerate(stacks):
        if is_orthogonalised(stack):
            groups.setdefault(shared(stack), []).append(index)
    names = set[str]()
    for members in groups.values():
        side = _side(stacks[members[0]])
        depths = [stacks[index].depth for index in members]
        many = "1 matrix" if sum(depths) == 1 else f"{sum(depths)} matrices"
        update.section(f"towards the polar factors of {many} of lesser side {side}")
        scaled = {}
        for index in members:
            stack = stacks[index]
            scaled[index] = update.let(f"scaled_{stack.key}", values[index], stack.matrix_shape)
        grams = [_gram(scaled[index], stacks[index]) for index in members]
        joined = grams[0] if len(grams) == 1 else update.call(torch.cat, grams)
        name = f"towards_polar_{side}"
        if name in names:  # of another device or dtype
            name += f"_{len(names)}"
        names.add(name)
        left = update.call(orthogonaliser, joined, context.option("orthogonalise", stacks[0]))
        left = update.let(name, left, (sum(depths), side, side))
        parts = [left]
        if len(grams) > 1:
            split = update.let(f"{name}_parts", left.split(depths))
            parts = [split[place] for place in range(len(grams))]
        for index, part in zip(members, parts, strict=True):
            found[index] = _moved(context, stacks[index], scaled[index], part)
    return [
        found[index] if index in found else (values[index], bases_of(context, stack))
        for index, stack in enumerate(stacks)
    ]


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
    """What stacks have in common whose Gram matrices go together."""
    return stack.device, stack.dtype, _side(stack)


def _side(stack: StackSpec) -> int:
    return min(stack.matrix_shape[1:])


def _is_tall(stack: StackSpec) -> bool:
    return stack.matrix_shape[1] > stack.matrix_shape[2]


def _gram(matrix: Value, stack: StackSpec) -> Value:
    """Of the lesser side."""
    return transposed(matrix) @ matrix if _is_tall(stack) else matrix @ transposed(matrix)
