"""Generate the pointwise part of a step: one call for all stacks of a scaling, not one a stack.

What is large is a list with an entry for each stack. On a GPU such a call is a launch or a few,
however many stacks there are; on a CPU it is a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kfc_fx.codegen.functions.accumulate import describe
from kfc_fx.codegen.pieces.bases import bases_of
from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.matrices import gather, rotate
from kfc_fx.codegen.spec import StackSpec
from kfc_fx.codegen.text.update_graph import Value


def stacked_gradient(context: Context, stack: StackSpec) -> Value:
    """``∇`` of a stack, in a section of its own."""
    context.update.section(describe(stack))
    g = gather(context.update, stack, context.arguments["gradients"])
    return context.update.let(f"g_{stack.key}", g, stack.matrix_shape)


def rotated_gradient(context: Context, stack: StackSpec) -> tuple[Value, Value]:
    """``∇`` and ``Q_Γᵀ ∇ Q_Ω`` of a stack, in a section of their own."""
    g = stacked_gradient(context, stack)
    basis = bases_of(context, stack)
    if not basis:
        return g, g
    rotated = rotate(context.update, stack, basis, g)
    return g, context.update.let(f"rotated_{stack.key}", rotated, stack.matrix_shape)


def average(
    context: Context, name: str, stacks: Sequence[StackSpec], new: Value, weight: Value
) -> Value:
    """``old + weight (new − old)`` of a state, the new state."""
    old = context.states(name, stacks)
    return context.keep(name, stacks, context.update.call(torch._foreach_lerp, old, new, weight))


def second_moments(context: Context, stacks: Sequence[StackSpec], rotated: Value) -> Value:
    """The EMA of the squares of the rotated gradients."""
    squares = context.update.call(torch._foreach_mul, rotated, rotated)
    decay = context.option("second_moment_decay", stacks[0])
    return average(context, "v", stacks, squares, 1 - decay)


def first_moments(context: Context, stacks: Sequence[StackSpec], gradients: Value) -> Value:
    """The EMA of the gradients, with Nesterov's step ahead where that is on; without momentum the
    gradients themselves."""
    if not context.has_momentum(stacks[0]):
        return gradients
    momentum = context.option("momentum", stacks[0])
    m = average(context, "m", stacks, gradients, 1 - momentum)
    if not context.steps_ahead(stacks[0]):
        return m
    ahead = context.update.call(torch._foreach_lerp, gradients, m, momentum)
    return context.update.let_list("ahead", ahead)
