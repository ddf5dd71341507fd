"""Between parameters and stacked matrices ``[W b]``: gathering gradients, scattering steps.

A block's columns are ``weight.reshape(C_out, -1)``, channel-major; those of a separable factor
offset-major, so that the rotation by the channel basis is one large product. A weight that has
its inputs first is transposed. The bias column is the last one in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kfc_fx.codegen.pieces.context import StackContext
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.rotation import rotate_columns, rotate_product, rotate_rows
from kfc_fx.plan.spec import BlockSpec


def gather(update: UpdateGraph, stack: StackSpec, tensors: Value) -> Value:
    """Stack the gradients of a stack's blocks: ``[depth, rows, columns]``."""
    matrix = _joined(update, "weights", [_weight_matrix(stack, b, tensors) for b in stack.blocks])
    if stack.bias:
        biases = [
            tensors[block.bias].reshape(block.groups, block.rows, 1) for block in stack.blocks
        ]
        matrix = update.call(torch.cat, [matrix, _joined(update, "biases", biases)], 2)
    return matrix.to(getattr(torch, stack.dtype)) if stack.converts else matrix


def scatter(stack: StackSpec, matrix: Value) -> dict[str, Value]:
    """Views of a stacked matrix in the shapes of the parameters, by their names."""
    views: dict[str, Value] = {}
    for block in stack.blocks:
        start, stop = stack.spans[block.name]
        own = slice(None) if stack.depth == stop - start else slice(start, stop)
        width = block.channels * block.offsets
        whole = own == slice(None) and not stack.bias
        weight = matrix if whole else matrix[own, :, :width] if stack.bias else matrix[own]
        if stack.forms.input == "separable":
            weight = transposed(weight.unflatten(2, (block.offsets, block.channels)))
        if block.inputs_first:
            weight = transposed(weight)
        views[block.weight] = weight.reshape(*block.weight_shape)
        if block.bias is not None:
            views[block.bias] = matrix[own, :, width].reshape(*block.bias_shape)
    return views


def in_row_parts(stack: StackSpec, matrix: Value) -> Value:
    """The matrices that have a polar factor each, ``stack.polar_shape``."""
    return matrix.reshape(*stack.polar_shape) if stack.row_parts > 1 else matrix


def from_row_parts(stack: StackSpec, parts: Value) -> Value:
    """The matrix whose rows they are, ``stack.matrix_shape``."""
    return parts.reshape(*stack.matrix_shape) if stack.row_parts > 1 else parts


def step_by_parameter(local: StackContext, step: Value) -> dict[str, Value]:
    """The step of a stack as views in the shapes of the parameters, by their names; zero for
    blocks that have no gradient."""
    if local.spec.partial:
        step = step * local.arguments["active"]
    return scatter(local.stack, local.let("step", step))


def rotate(
    local: StackContext, bases: Mapping[str, Value], matrix: Value, *, back: bool = False
) -> Value:
    """``Q_Γᵀ M Q_Ω``, or ``Q_Γ M Q_Ωᵀ`` with ``back``; a diagonal factor turns nothing.

    Args:
        bases: by factor, of those in ``stack.basis_shapes``.
    """
    return rotate_input(local, bases, rotate_output(local, bases, matrix, back=back), back=back)


def rotate_output(
    local: StackContext, bases: Mapping[str, Value], matrix: Value, *, back: bool = False
) -> Value:
    """``Q_Γᵀ M``, or ``Q_Γ M`` with ``back``; M where there is no ``gamma`` among the bases."""
    if "gamma" not in bases:
        return matrix
    left = bases["gamma"] if back else transposed(bases["gamma"])
    if local.stack.forms.output_parts > 1:
        return local.update.call(rotate_rows, left, matrix)
    return left @ matrix


def rotate_input(
    local: StackContext, bases: Mapping[str, Value], matrix: Value, *, back: bool = False
) -> Value:
    """``M Q_Ω``, or ``M Q_Ωᵀ`` with ``back``.

    Args:
        bases: ``omega``, or ``channel`` and ``offset`` whose product Q_Δ ⊗ Q_C is applied to all
            columns but the bias, which is multiplied by ``bias`` where that is given. Of a
            diagonal factor, none or its weights.
    """
    forms = local.stack.forms
    if forms.input == "diagonal":
        return matrix * bases["omega"] if "omega" in bases else matrix
    turns = {n: transposed(q) if back and n != "bias" else q for n, q in bases.items()}
    if forms.input == "separable":
        names = [name for name in ("channel", "offset", "bias") if name in turns]
        return local.update.call(rotate_product, matrix, *(turns[name] for name in names))
    if forms.input_parts > 1:
        return local.update.call(rotate_columns, matrix, turns["omega"])
    return matrix @ turns["omega"]


def transposed(matrix: Value) -> Value:
    """``matrix.mT``."""
    return matrix.tracer.create_proxy("call_function", getattr, (matrix, "mT"), {})


def _weight_matrix(stack: StackSpec, block: BlockSpec, tensors: Value) -> Value:
    weight = tensors[block.weight]
    if block.inputs_first:
        return transposed(weight.reshape(block.groups, block.channels, block.rows))
    if stack.forms.input != "separable":
        return weight.reshape(block.groups, block.rows, block.channels * block.offsets)
    split = weight.reshape(block.groups, block.rows, block.channels, block.offsets)
    return transposed(split).flatten(2)


def _joined(update: UpdateGraph, name: str, parts: list[Value]) -> Value:
    return parts[0] if len(parts) == 1 else update.let(name, update.call(torch.cat, parts))
