"""Generate "eigen": a diagonal second moment in the eigenbasis of Ω ⊗ Γ (EKFAC)."""

from __future__ import annotations

import torch

from kfc_fx.codegen import bases
from kfc_fx.codegen.bases import bases_of, basis_entries, refresh_bases, turn_moments
from kfc_fx.codegen.bases import decompositions as decompositions
from kfc_fx.codegen.context import Context
from kfc_fx.codegen.layout import StackSpec
from kfc_fx.codegen.matrices import gather, rotate
from kfc_fx.codegen.state_entry import StateEntry
from kfc_fx.codegen.update_graph import Value

SUMMARY = """The inverse of a diagonal in the eigenbasis of Ω ⊗ Γ (George et al. 2018, EKFAC).

    v = −lr Q_Γ [(Q_Γᵀ ∇ Q_Ω) / (s + damping)] Q_Ωᵀ{clip},
    s the EMA of (Q_Γᵀ ∇ Q_Ω)²;
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
    if not first:
        turn_moments(context, stack, first_moment=False)
    return failed


def direction(context: Context, stack: StackSpec) -> tuple[Value, Value]:
    """(gradient, v) of a stack."""
    update, arguments = context.update, context.arguments
    key, shape = stack.key, stack.matrix_shape
    decay = context.option("second_moment_decay", stack)
    g = update.let(f"g_{key}", gather(update, stack, arguments["gradients"]), shape)
    basis = bases_of(context, stack)
    rotated = g
    if basis:
        rotated = update.let(f"rotated_{key}", rotate(update, stack, basis, g), shape)
    s = update.call(torch.lerp, context.state("v", stack), rotated.square(), 1 - decay)
    s = context.keep("v", stack, s)
    scale = s / (1 - decay ** arguments["step"]) + context.option("damping", stack)
    scaled = update.let(f"scaled_{key}", rotated / scale, shape)
    natural = rotate(update, stack, basis, scaled, back=True)
    return g, update.let(f"vector_{key}", natural * -arguments["lr"][key], shape)
