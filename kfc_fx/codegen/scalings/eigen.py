"""Generate "eigen": a diagonal second moment in the eigenbasis of Ω ⊗ Γ (EKFAC)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces import bases
from kfc_fx.codegen.pieces.bases import bases_of, basis_entries, refresh_bases, turned_moments
from kfc_fx.codegen.pieces.bases import decompositions as decompositions
from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Made
from kfc_fx.codegen.pieces.matrices import rotate
from kfc_fx.codegen.pieces.moments import (
    half,
    rotated,
    second_moments,
    stacked_gradient,
    vector,
    wide,
)
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value

SUMMARY = """One step of EKFAC (George et al. 2018): the inverse of a diagonal in the eigenbasis of
Ω ⊗ Γ.

v = −lr Q_Γ [(Q_Γᵀ ∇ Q_Ω) / (s + damping)] Q_Ωᵀ{clip}; p ← momentum p + v; θ ← θ + {moved}. s is the
EMA of (Q_Γᵀ ∇ Q_Ω)², times the number of examples that ∇ is the mean of: the second moment of one
example's gradient, where noise is most of it."""
OPTIONS: tuple[str, ...] = ("step", "second_moment_decay", "damping")
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = bases.REFRESH_SUMMARY
FOLLOW_SUMMARY = bases.FOLLOW_SUMMARY
KEEPS_BASES = True
COUNTS_EXAMPLES = True


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Bases, second moments in them, and the momentum in the original coordinates."""
    return basis_entries(stack, "p" if momentum else None)


def refresh(local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
    """New bases, and second moments turned into them."""
    entries, failed = refresh_bases(local, made)
    return entries | turned_moments(local, entries, first_moment=False), failed


def directions(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """v of each stack, and its part of ν where that is asked."""
    gradients: Value = None
    if context.spec.takes_nu_from_factors:
        found = [context.of_stack("gather", stack, stacked_gradient) for stack in stacks]
        gradients = context.update.named_list("gradients_of_stacks", found)
    turned = [
        context.of_stack("rotate", stack, _rotated, **_own(gradients, index))
        for index, stack in enumerate(stacks)
    ]
    scaled = _scaled(context, stacks, turned)
    for index, stack in enumerate(stacks):
        rate = context.arguments["lr"][stack.key]
        given = {"scaled": scaled[index], "lr": rate, **_own(gradients, index)}
        yield context.of_stack("vector", stack, _vector, **given)


def _own(gradients: Value, index: int) -> dict[str, Value]:
    return {} if gradients is None else {"gradient": gradients[index]}


def _rotated(local: StackContext) -> Value:
    gradient = local.arguments.get("gradient")
    return rotated(local, stacked_gradient(local) if gradient is None else gradient)


def _scaled(context: Context, stacks: Sequence[StackSpec], turned: Sequence[Value]) -> Value:
    """The rotated gradients over the second moments of one example's, a list."""
    one, update = stacks[0], context.update
    given = {"rotated": list(turned), "v": context.states("v", stacks)}
    given["examples"] = context.states("examples", stacks)
    given |= {name: context.option(name, one) for name in ("second_moment_decay", "damping")}
    given["step"] = context.arguments["step"]
    if context.spec.partial:
        given["active"] = context.actives(stacks)

    def body(update: UpdateGraph, values: dict[str, Value]) -> object:
        values |= wide(update, context.spec, values)
        new_v = second_moments(update, values, values["rotated"])
        correction = 1 - values["second_moment_decay"] ** values["step"]
        corrected = update.call(torch._foreach_div, new_v, correction)
        scale = update.let("scale", update.call(torch._foreach_mul, corrected, values["examples"]))
        update.effect(torch._foreach_add_, scale, values["damping"])
        scaled = update.call(torch._foreach_div, values["rotated"], scale)
        return scaled, half(update, context.spec, new_v)

    section = f'second moments of all "{one.scaling}" stacks, and the gradients that they scale'
    names = [context.name(name, one.scaling) for name in ("scaled", "v")]
    call = context.of_scaling("moments", one.scaling, section, body, **given)
    scaled, v = update.let_tuple(names, call)
    context.keep("v", stacks, v)
    return scaled


def _vector(local: StackContext) -> object:
    natural = rotate(local, bases_of(local), local.arguments["scaled"], back=True)
    return vector(local, natural * -local.arguments["lr"], local.arguments.get("gradient"))
