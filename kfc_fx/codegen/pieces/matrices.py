"""Between parameters and stacked matrices ``[W b]``: gathering gradients, scattering steps.

A block's columns are ``weight.reshape(C_out, -1)``, channel-major; those of a separable factor
offset-major, so that the rotation by the channel basis is one large product. A weight that has
its inputs first is transposed. The bias column is the last one in all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.plan.spec import BlockSpec


def gather(update: UpdateGraph, stack: StackSpec, tensors: Value) -> Value:
    """Stack the gradients of a stack's blocks: ``[depth, rows, columns]``."""
    weights = [_weight_matrix(stack, block, tensors) for block in stack.blocks]
    matrix = _joined(update, weights)
    if stack.bias:
        biases = [
            tensors[block.bias].reshape(block.groups, block.rows, 1) for block in stack.blocks
        ]
        matrix = update.call(torch.cat, [matrix, _joined(update, biases)], 2)
    return matrix.to(getattr(torch, stack.dtype)) if stack.converts else matrix


def scatter(update: UpdateGraph, stack: StackSpec, matrix: Value) -> dict[str, Value]:
    """Views of a stacked matrix in the shapes of the parameters."""
    views: dict[str, Value] = {}
    for block in stack.blocks:
        start, stop = stack.spans[block.name]
        entry = matrix
        if stack.depth != stop - start:
            entry = update.let(f"step_{identifier(block.name)}", matrix[start:stop])
        width = block.channels * block.offsets
        weight = entry[:, :, :width] if stack.bias else entry
        if stack.forms.input == "separable":
            weight = _attribute(weight.unflatten(2, (block.offsets, block.channels)), "mT")
        if block.inputs_first:
            weight = _attribute(weight, "mT")
        views[block.weight] = weight.reshape(block.weight_shape)
        if block.bias is not None:
            views[block.bias] = entry[:, :, width].reshape(block.bias_shape)
    return views


def rotate(
    update: UpdateGraph,
    stack: StackSpec,
    bases: Mapping[str, Value],
    matrix: Value,
    *,
    back: bool = False,
) -> Value:
    """``Q_Γᵀ M Q_Ω``, or ``Q_Γ M Q_Ωᵀ`` with ``back``; a diagonal factor turns nothing.

    Args:
        bases: by factor, of those in ``stack.basis_shapes``.
    """
    if "gamma" in bases:
        parts, left = stack.forms.output_parts, bases["gamma"]
        if parts > 1:
            side = stack.first.rows // parts
            matrix = matrix.unflatten(1, (parts, side)).flatten(0, 1)
        matrix = (left if back else transposed(left)) @ matrix
        if parts > 1:
            matrix = matrix.unflatten(0, (stack.depth, parts)).flatten(1, 2)
    return rotate_input(update, stack, bases, matrix, back=back)


def rotate_input(
    update: UpdateGraph,
    stack: StackSpec,
    bases: Mapping[str, Value],
    matrix: Value,
    *,
    back: bool = False,
) -> Value:
    """``M Q_Ω``, or ``M Q_Ωᵀ`` with ``back``.

    Args:
        bases: ``omega``, or ``channel`` and ``offset`` whose product Q_Δ ⊗ Q_C is applied to all
            columns but the bias, which is multiplied by ``bias`` where that is given. Of a
            diagonal factor, none or its weights.
    """
    if stack.forms.input == "diagonal":
        return matrix * bases["omega"] if "omega" in bases else matrix
    if stack.forms.input_parts > 1:
        return _rotate_parts(update, stack, bases["omega"], matrix, back=back)
    if stack.forms.input == "dense":
        return matrix @ (_attribute(bases["omega"], "mT") if back else bases["omega"])
    block = stack.first
    matrix = update.let(f"left_{stack.key}", matrix, stack.matrix_shape)
    width = block.channels * block.offsets
    main = matrix[:, :, :width] if stack.bias else matrix
    main = main.unflatten(2, (block.offsets, block.channels))
    channel, offset = bases["channel"], bases["offset"].unsqueeze(1)
    # The offsets are turned in many tiny products, whose basis is cheap to broadcast; the
    # channels in one large product, because broadcasting their basis would copy it.
    shape = (stack.depth, block.rows, block.offsets, block.channels)
    half = (offset if back else transposed(offset)) @ main
    half = update.let(f"half_{stack.key}", half, shape).flatten(1, 2)
    flat_shape = (stack.depth, block.rows * block.offsets, block.channels)
    turned = half @ (transposed(channel) if back else channel)
    turned = update.let(f"turned_{stack.key}", turned, flat_shape)
    turned = turned.unflatten(1, (block.rows, block.offsets)).flatten(2)
    if stack.bias:
        last = matrix[:, :, width:]
        last = last * bases["bias"] if "bias" in bases else last
        return update.call(torch.cat, [turned, last], 2)
    return turned


def _rotate_parts(
    update: UpdateGraph, stack: StackSpec, basis: Value, matrix: Value, *, back: bool
) -> Value:
    """Each part of the columns by its own basis ``[depth · parts, side, side]``; the bias column,
    which is apart, stays."""
    parts, width = stack.forms.input_parts, stack.first.channels
    matrix = update.let(f"left_{stack.key}", matrix, stack.matrix_shape)
    main = matrix[:, :, :width] if stack.bias else matrix
    main = main.unflatten(2, (parts, width // parts)).transpose(1, 2).flatten(0, 1)
    turned = main @ (transposed(basis) if back else basis)
    turned = turned.unflatten(0, (stack.depth, parts)).transpose(1, 2).flatten(2)
    return update.call(torch.cat, [turned, matrix[:, :, width:]], 2) if stack.bias else turned


def transposed(matrix: Value) -> Value:
    """``matrix.mT``."""
    return _attribute(matrix, "mT")


def _weight_matrix(stack: StackSpec, block: BlockSpec, tensors: Value) -> Value:
    weight = tensors[block.weight]
    if block.inputs_first:
        shape = (block.groups, block.channels, block.rows)
        return _attribute(weight.reshape(shape), "mT")
    if stack.forms.input != "separable":
        return weight.reshape(block.groups, block.rows, block.channels * block.offsets)
    split = weight.reshape(block.groups, block.rows, block.channels, block.offsets)
    return _attribute(split, "mT").flatten(2)


def _joined(update: UpdateGraph, parts: list[Value]) -> Value:
    return parts[0] if len(parts) == 1 else update.call(torch.cat, parts)


def _attribute(value: Value, name: str) -> Value:
    return value.tracer.create_proxy("call_function", getattr, (value, name), {})


def identifier(path: str) -> str:
    """A module path as part of a Python name."""
    return "".join(c if c.isalnum() else "_" for c in path)
