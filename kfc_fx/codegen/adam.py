"""Generate "adam": Adam in the eigenbasis of Ω ⊗ Γ."""

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

SUMMARY = """Adam in the eigenbasis of Ω ⊗ Γ.

    Both moments live in the basis, and ``refresh`` turns them with it; both are
    bias-corrected{ahead}.
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
    if not first:
        turn_moments(context, stack, first_moment=context.has_momentum(stack))
    return failed


def step(context: Context, stack: StackSpec) -> Value:
    """``−lr Q_Γ [m̂ / (sqrt(v̂) + ε)] Q_Ωᵀ``."""
    update, arguments = context.update, context.arguments
    key, shape = stack.key, stack.matrix_shape
    decay, count = context.option("second_moment_decay", stack), arguments["step"]
    g = update.let(f"g_{key}", gather(update, stack, arguments["gradients"]), shape)
    basis = bases_of(context, stack)
    rotated = g
    if basis:
        rotated = update.let(f"rotated_{key}", rotate(update, stack, basis, g), shape)
    v = update.call(torch.lerp, context.state("v", stack), rotated.square(), 1 - decay)
    v = context.keep("v", stack, v)
    ahead = rotated
    if context.has_momentum(stack):
        momentum = context.option("momentum", stack)
        m = update.call(torch.lerp, context.state("m", stack), rotated, 1 - momentum)
        m = context.keep("m", stack, m)
        if context.steps_ahead(stack):
            ahead = update.call(torch.lerp, rotated, m, momentum) / (1 - momentum ** (count + 1))
        else:
            ahead = m / (1 - momentum**count)
        ahead = update.let(f"ahead_{key}", ahead, shape)
    root = (v / (1 - decay**count)).sqrt()
    scale = update.let(f"scale_{key}", root + context.option("eps", stack), shape)
    scaled = update.let(f"scaled_{key}", ahead / scale, shape)
    turned = rotate(update, stack, basis, scaled, back=True)
    return context.step(stack, turned * -arguments["lr"][key])
