"""Generate "eigen": a diagonal second moment in the eigenbasis of Ω ⊗ Γ (EKFAC)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces import bases
from kfc_fx.codegen.pieces.bases import bases_of, basis_entries, refresh_bases, turn_moments
from kfc_fx.codegen.pieces.bases import decompositions as decompositions
from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.matrices import rotate
from kfc_fx.codegen.pieces.moments import rotated_gradient, second_moments
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import Value

SUMMARY = """The inverse of a diagonal in the eigenbasis of Ω ⊗ Γ (George et al. 2018, EKFAC).

    v = −lr Q_Γ [(Q_Γᵀ ∇ Q_Ω) / (s + damping)] Q_Ωᵀ{clip},
    s the EMA of (Q_Γᵀ ∇ Q_Ω)², times the number of examples that ∇ is the mean of: the second
    moment of one example's gradient, where noise is most of it;
    p ← momentum p + v; θ ← θ + {moved}."""
OPTIONS: tuple[str, ...] = ("step", "second_moment_decay", "damping")
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = bases.REFRESH_SUMMARY
START_SUMMARY: str | None = bases.START_SUMMARY


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Bases, second moments in them, and the momentum in the original coordinates."""
    entries = basis_entries(stack)
    entries["v"] = StateEntry(stack.matrix_shape, "zeros")
    if momentum:
        entries["p"] = StateEntry(stack.matrix_shape, "zeros")
    return entries


def refresh(context: Context, stack: StackSpec, *, first: bool) -> list[Value]:
    """New bases, and second moments turned into them."""
    failed = refresh_bases(context, stack, first=first)
    turn_moments(context, stack, first_moment=False)
    return failed


def directions(context: Context, stacks: Sequence[StackSpec]) -> Iterator[tuple[Value, Value]]:
    """(gradient, v) of each stack."""
    update, arguments, one = context.update, context.arguments, stacks[0]
    decay = context.option("second_moment_decay", one)
    found = [rotated_gradient(context, stack) for stack in stacks]
    update.section('second moments of all "eigen" stacks')
    rotated = update.named_list("rotated", [r for _, r in found])
    s = second_moments(context, stacks, rotated)
    corrected = update.call(torch._foreach_div, s, 1 - decay ** arguments["step"])
    counts = context.states("examples", stacks)
    scale = update.let_list("scale", update.call(torch._foreach_mul, corrected, counts))
    update.effect(torch._foreach_add_, scale, context.option("damping", one))
    scaled = update.let_list("scaled", update.call(torch._foreach_div, rotated, scale))
    for index, (stack, (g, _)) in enumerate(zip(stacks, found, strict=True)):
        update.section(f"{stack.key}: v")
        natural = rotate(update, stack, bases_of(context, stack), scaled[index], back=True)
        v = natural * -arguments["lr"][stack.key]
        yield g, update.let(f"vector_{stack.key}", v, stack.matrix_shape)
