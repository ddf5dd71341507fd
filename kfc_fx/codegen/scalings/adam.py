"""Generate "adam": Adam in the eigenbasis of Ω ⊗ Γ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces import bases
from kfc_fx.codegen.pieces.bases import bases_of, basis_entries, refresh_bases, turn_moments
from kfc_fx.codegen.pieces.bases import decompositions as decompositions
from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.matrices import rotate
from kfc_fx.codegen.pieces.moments import first_moments, rotated_gradient, second_moments
from kfc_fx.codegen.pieces.orthogonal import orthogonalised
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import Value

SUMMARY = """Adam in the eigenbasis of Ω ⊗ Γ.

    Both moments live in the basis, and ``refresh`` turns them with it; both are
    bias-corrected{ahead}{orthogonal}.
    ``step`` counts from one, ``lr`` holds one rate per block."""
OPTIONS: tuple[str, ...] = ("step", "second_moment_decay", "eps")
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = bases.REFRESH_SUMMARY
START_SUMMARY: str | None = bases.START_SUMMARY


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Bases, and moments in them."""
    entries = basis_entries(stack)
    entries["v"] = StateEntry(stack.matrix_shape, "zeros")
    if momentum:
        entries["m"] = StateEntry(stack.matrix_shape, "zeros")
    return entries


def refresh(context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
    """New bases, and moments turned into them."""
    failed = refresh_bases(context, stack, first=first)
    turn_moments(context, stack, first_moment=context.has_momentum(stack))
    return failed


def steps(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """``−lr Q_Γ [m̂ / (sqrt(v̂) + ε)] Q_Ωᵀ``.

    Both corrections are numbers, so they are applied to ε and to the rate:
    ``m̂ / (sqrt(v̂) + ε) = (r / c) m / (sqrt(v) + r ε)`` with ``m̂ = m / c`` and ``v̂ = v / r²``.
    """
    update, arguments, one = context.update, context.arguments, stacks[0]
    decay, count = context.option("second_moment_decay", one), arguments["step"]
    found = [rotated_gradient(context, stack)[1] for stack in stacks]
    update.section('both moments of all "adam" stacks')
    rotated = update.named_list("rotated", found)
    v = second_moments(context, stacks, rotated)
    ahead = first_moments(context, stacks, rotated)
    root = update.let("root", (1 - decay**count) ** 0.5)
    scale = update.let_list("scale", update.call(torch._foreach_sqrt, v))
    update.effect(torch._foreach_add_, scale, context.option("eps", one) * root)
    scaled = update.let_list("scaled", update.call(torch._foreach_div, ahead, scale))
    if context.spec.orthogonalise:
        moved = orthogonalised(context, stacks, scaled)
    else:
        moved = [(scaled[i], bases_of(context, stack)) for i, stack in enumerate(stacks)]
    rate = -root
    if context.has_momentum(one):
        weights = count + 1 if context.steps_ahead(one) else count
        rate = rate / (1 - context.option("momentum", one) ** weights)
    rates = [arguments["lr"][stack.key] for stack in stacks]
    rates = update.let("rates", update.call(torch._foreach_mul, rates, rate))
    for index, stack in enumerate(stacks):
        update.section(f"{stack.key}: step")
        matrix, back = moved[index]
        turned = rotate(update, stack, back, matrix, back=True)
        yield context.step(stack, turned * rates[index])
