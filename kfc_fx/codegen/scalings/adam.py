"""Generate "adam": Adam in the eigenbasis of Ω ⊗ Γ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from kfc_fx.codegen.pieces import bases
from kfc_fx.codegen.pieces.bases import bases_of, basis_entries, refresh_bases, turned_moments
from kfc_fx.codegen.pieces.bases import decompositions as decompositions
from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.pieces.decompositions import Made
from kfc_fx.codegen.pieces.matrices import rotate, step_by_parameter
from kfc_fx.codegen.pieces.moments import (
    first_moments,
    half,
    rotated,
    second_moments,
    stacked_gradient,
    step_ahead,
    wide,
)
from kfc_fx.codegen.pieces.orthogonal import moved, parted, towards_polar
from kfc_fx.codegen.spec import StackSpec, StateEntry
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value, complements_of_powers

SUMMARY = """One step of Adam in the eigenbasis of Ω ⊗ Γ.

Both moments live in the basis, and ``refresh`` turns them with it. Both are bias-corrected{ahead}.
{orthogonal}``step`` counts from one; ``lr`` holds one rate for each layer."""
OPTIONS: tuple[str, ...] = ("step", "second_moment_decay", "eps")
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = bases.REFRESH_SUMMARY
FOLLOW_SUMMARY = bases.FOLLOW_SUMMARY
KEEPS_BASES = True
COUNTS_EXAMPLES = False


def state_entries(stack: StackSpec, *, momentum: bool) -> dict[str, StateEntry]:
    """Bases, and moments in them."""
    return basis_entries(stack, "m" if momentum else None)


def refresh(local: StackContext, made: Made) -> tuple[dict[str, Value], list[Value]]:
    """New bases, and moments turned into them."""
    entries, failed = refresh_bases(local, made)
    first_moment = local.stack.scaling in local.spec.momentum
    return entries | turned_moments(local, entries, first_moment=first_moment), failed


def steps(context: Context, stacks: Sequence[StackSpec]) -> Iterator[Value]:
    """``−lr Q_Γ [m̂ / (sqrt(v̂) + ε)] Q_Ωᵀ``.

    Both corrections are numbers, so they are applied to ε and to the rate:
    ``m̂ / (sqrt(v̂) + ε) = (r / c) m / (sqrt(v) + r ε)`` with ``m̂ = m / c`` and ``v̂ = v / r²``.
    """
    one, update = stacks[0], context.update
    decay, count = context.option("second_moment_decay", one), context.arguments["step"]
    found = [
        context.of_stack("rotate", stack, lambda local: rotated(local, stacked_gradient(local)))
        for stack in stacks
    ]
    momentum = context.momentum(stacks) if context.has_momentum(one) else None
    root = update.let("root", (1 - decay**count) ** 0.5)
    scaled = _scaled(context, stacks, found, momentum, root)
    matrices = [scaled[index] for index in range(len(stacks))]
    parts: dict[str, Value] = {}
    if one.scaling in context.spec.orthogonalize:
        for index, stack in enumerate(stacks):
            if stack.row_parts > 1:
                matrices[index] = context.of_stack("part", stack, _part, scaled=matrices[index])
        parts = towards_polar(context, stacks, matrices)
    rates = _rates(context, stacks, momentum, root)
    for index, stack in enumerate(stacks):
        given = {"scaled": matrices[index]}
        if stack.key in parts:
            given["towards_polar"] = parts[stack.key]
        yield context.of_stack("step", stack, _step, **given, rate=rates[index])


def _scaled(
    context: Context,
    stacks: Sequence[StackSpec],
    rotated_gradients: Sequence[Value],
    momentum: Value | None,
    root: Value,
) -> Value:
    """``m / (sqrt(v) + r ε)`` of each stack, a list."""
    one = stacks[0]
    given = {"rotated": list(rotated_gradients), "v": context.states("v", stacks)}
    if momentum is not None:
        given |= {"m": context.states("m", stacks), "momentum": momentum}
    given |= {name: context.option(name, one) for name in ("second_moment_decay", "eps")}
    given["root"] = root
    if context.spec.partial:
        given["active"] = context.actives(stacks)

    def body(update: UpdateGraph, values: dict[str, Value]) -> object:
        values |= wide(update, context.spec, values)
        new_v = second_moments(update, values, values["rotated"])
        new_m = ahead = values["rotated"]
        if momentum is not None:
            own = context.spec.has_own_momenta(one.scaling)
            new_m = ahead = first_moments(update, values, values["rotated"], own=own)
        if momentum is not None and context.steps_ahead(one):
            ahead = step_ahead(update, values["rotated"], new_m, values["momentum"])
        scale = update.let("scale", update.call(torch._foreach_sqrt, new_v))
        update.effect(torch._foreach_add_, scale, values["eps"] * values["root"])
        if ahead is new_m:  # which is kept, or is the gradient
            scaled = update.call(torch._foreach_div, ahead, scale)
        else:
            update.effect(torch._foreach_div_, ahead, scale)
            scaled = ahead
        kept = [half(update, context.spec, new) for new in (new_v, new_m)]
        return (scaled, *kept[:1]) if momentum is None else (scaled, *kept)

    section = f'both moments of all "{one.scaling}" stacks, and the gradients that they scale'
    names = ["scaled", "v"] if momentum is None else ["scaled", "v", "m"]
    call = context.of_scaling("moments", one.scaling, section, body, **given)
    scaled, *state = context.update.let_tuple([context.name(n, one.scaling) for n in names], call)
    for name, new in zip(names[1:], state, strict=True):
        context.keep(name, stacks, new)
    return scaled


def _rates(
    context: Context, stacks: Sequence[StackSpec], momentum: Value | None, root: Value
) -> Value:
    """``−lr r / c`` of each stack, a list."""
    update, one, count = context.update, stacks[0], context.arguments["step"]
    weights = count + 1 if context.steps_ahead(one) else count
    rates = context.each("lr", stacks)
    if momentum is None:
        found = update.call(torch._foreach_mul, rates, -root)
    elif context.spec.has_own_momenta(one.scaling):
        corrections = update.call(complements_of_powers, momentum, weights)
        found = update.call(torch._foreach_mul, rates, -root)
        found = update.call(torch._foreach_div, found, corrections)
    else:
        found = update.call(torch._foreach_mul, rates, -root / (1 - momentum**weights))
    return update.let(context.name("rates", one.scaling), found)


def _part(local: StackContext) -> Value:
    return parted(local, local.arguments["scaled"])


def _step(local: StackContext) -> object:
    matrix, back = local.arguments["scaled"], bases_of(local)
    if "towards_polar" in local.arguments:
        matrix, back = moved(local, matrix, local.arguments["towards_polar"])
    step = rotate(local, back, matrix, back=True) * local.arguments["rate"]
    return step_by_parameter(local, step)
