"""Generate the pointwise part of a step: one call for all stacks of a scaling, not one a stack.

What is large is a list with an entry for each stack. On a GPU such a call is a launch or a few,
however many stacks there are; on a CPU it is a loop.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kfc_fx.codegen.pieces.bases import bases_of
from kfc_fx.codegen.pieces.context import StackContext, kept
from kfc_fx.codegen.pieces.matrices import gather, rotate
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value, complements
from kfc_fx.linalg.bounded import bounded
from kfc_fx.linalg.half import halved, widened

MOMENTS = ("v", "m", "p")
"""Names of moments in the state of a stack."""


def stacked_gradient(local: StackContext) -> Value:
    """``∇`` of a stack, each block's no larger than the bound where there is one."""
    gradient = gather(local.update, local.stack, local.arguments["gradients"])
    if local.spec.bounds_gradients:
        groups = local.stack.first.groups
        largest = local.arguments["max_block_norm"]
        found = [gradient, largest, groups] if groups > 1 else [gradient, largest]
        gradient = local.update.call(bounded, *found)
    return local.let("gradient", gradient)


def rotated(local: StackContext, gradient: Value) -> Value:
    """``Q_Γᵀ ∇ Q_Ω`` of a stack."""
    basis = bases_of(local)
    return local.let("rotated", rotate(local, basis, gradient)) if basis else gradient


def wide(update: UpdateGraph, spec: UpdateSpec, arguments: Mapping[str, Value]) -> dict[str, Value]:
    """The lists of moments among arguments, as they are computed with."""
    held = {name: arguments[name] for name in MOMENTS if name in arguments}
    if not spec.half_moments:
        return held
    return {n: update.let(f"wide_{n}", update.call(widened, own)) for n, own in held.items()}


def half(update: UpdateGraph, spec: UpdateSpec, moments: Value) -> Value:
    """A list of new moments as they are kept."""
    return update.call(halved, moments) if spec.half_moments else moments


def second_moments(update: UpdateGraph, arguments: Mapping[str, Value], gradients: Value) -> Value:
    """The EMA of the squares of gradients; ``arguments`` are ``v`` and what it takes."""
    decay = arguments["second_moment_decay"]
    new = update.let("new_v", update.call(torch._foreach_mul, arguments["v"], decay))
    update.effect(torch._foreach_addcmul_, new, gradients, gradients, 1 - decay)
    if "active" not in arguments:
        return new
    return update.let("kept_v", kept(update, arguments["active"], new, arguments["v"]))


def first_moments(
    update: UpdateGraph, arguments: Mapping[str, Value], gradients: Value, *, own: bool
) -> Value:
    """The EMA of gradients.

    Args:
        arguments: ``m`` and what it takes.
        own: whether each gradient has a momentum of its own.
    """
    momentum = arguments["momentum"]
    weight = update.call(complements, momentum) if own else 1 - momentum
    new = update.call(torch._foreach_lerp, arguments["m"], gradients, weight)
    return update.let("new_m", kept(update, arguments.get("active"), new, arguments["m"]))


def step_ahead(update: UpdateGraph, gradients: Value, m: Value, momentum: Value) -> Value:
    """The first moments that the next gradients would make, were they these again (Nesterov)."""
    return update.let("ahead", update.call(torch._foreach_lerp, gradients, m, momentum))


def vector(local: StackContext, v: Value, gradient: Value) -> object:
    """The vector v of a stack; where the clip takes ν from the factors, v and its part of
    ν = vᵀ(F + γ)v = −Σ lr ⟨∇, v⟩, since (F + γ) v = −lr ∇."""
    v = local.let("v", v)
    if not local.spec.takes_nu_from_factors:
        return v
    return v, -(local.arguments["lr"] * gradient * v).sum()
