"""Generate the update of generic parameters: AdamW or SGD with momentum, one call for all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.pieces.moments import half, wide
from kfc_fx.codegen.spec import UpdateSpec, counted
from kfc_fx.codegen.text.update_graph import (
    UpdateGraph,
    Value,
    complements,
    complements_of_powers,
)

NAMES = {"adamw": "AdamW", "sgd": "SGD"}


def moments_at_start(
    spec: UpdateSpec, gradient: Tensor, momentum: float, second_moment_decay: float, step: int
) -> tuple[Tensor, Tensor]:
    """Both moments from before a parameter's first step, which is the optimizer's ``step``-th.

    AdamW corrects them by the optimizer's own count. As if they had been of this gradient so far,
    they make of that what torch.optim.AdamW makes of its first; zeros where it is the first, and
    for SGD.
    """
    if spec.generic_rule == "sgd":
        return torch.zeros_like(gradient), torch.zeros_like(gradient)
    known = torch.nan_to_num(gradient, 0, 0, 0)  # whether it is finite is decided elsewhere
    first, second = (1 - decay ** (step - 1) for decay in (momentum, second_moment_decay))
    return known * first, known.square() * second


def generic_arguments(spec: UpdateSpec) -> list[str]:
    """Arguments of ``apply`` for the generic parameters, besides ``lr`` and ``gradients``."""
    names = []
    if _state_names(spec):
        names.append("generic")
    if "generic" in spec.momentum:
        names.append("generic_momentum")
    if spec.generic_rule == "adamw":
        names += ["generic_second_moment_decay", "generic_eps", "step"]
    return names


def generic_steps(context: Context) -> Value:
    """Steps to subtract from the generic parameters, a list in the order of the spec.

    New state goes into the result.
    """
    update, spec, outer = context.update, context.spec, context.arguments
    given = {"gradients": outer["gradients"]}
    given |= {name: outer["generic"][name] for name in _state_names(spec)}
    given["rates"] = outer["lr"]["generic"]
    for name in ("momentum", "second_moment_decay", "eps"):
        if f"generic_{name}" in outer:
            given[name] = outer[f"generic_{name}"]
    if "step" in outer:
        given["step"] = outer["step"]
    section = f"{counted(len(spec.generic), 'generic parameter')}: {NAMES[spec.generic_rule]}"
    call = update.function("step_generic", section, given, _body(spec))
    names = _state_names(spec)
    if not names:
        return update.let("generic_steps", call)
    steps, *state = update.let_tuple(["generic_steps", *(f"generic_{n}" for n in names)], call)
    context.result["generic"] = dict(zip(names, state, strict=True))
    return steps


def _state_names(spec: UpdateSpec) -> list[str]:
    has_moment = {"m": "generic" in spec.momentum, "v": spec.generic_rule == "adamw"}
    return [name for name, has in has_moment.items() if has]


def _body(spec: UpdateSpec):  # type: ignore[no-untyped-def]
    def build(update: UpdateGraph, given: Mapping[str, Value]) -> object:
        named = [given["gradients"][parameter.name] for parameter in spec.generic]
        named = [
            gradient.to(torch.float32) if parameter.converts else gradient
            for gradient, parameter in zip(named, spec.generic, strict=True)
        ]
        gradients = update.named_list("own_gradients", named)
        rule = _adamw if spec.generic_rule == "adamw" else _sgd
        moments = {**given, **wide(update, spec, given)}
        descent, *state = rule(update, spec, moments, gradients)
        state = [half(update, spec, moment) for moment in state]
        steps = update.call(torch._foreach_mul, descent, given["rates"])
        return (steps, *state) if state else steps

    return build


def _adamw(
    update: UpdateGraph, spec: UpdateSpec, given: Mapping[str, Value], gradients: Value
) -> list[Value]:
    """``m̂ / (sqrt(v̂) + ε)`` (Loshchilov & Hutter 2019, algorithm 2), and the new moments."""
    decay, step = given["second_moment_decay"], given["step"]
    corrected, state = gradients, []
    if "generic" in spec.momentum:
        m, correction = _first_moment(update, spec, given, gradients)
        corrected = update.call(torch._foreach_div, m, correction)
        state.append(m)
    squares = update.call(torch._foreach_mul, gradients, gradients)
    v = update.let("new_v", update.call(torch._foreach_lerp, given["v"], squares, 1 - decay))
    root = update.call(torch._foreach_sqrt, update.call(torch._foreach_div, v, 1 - decay**step))
    scale = update.let("scale", update.call(torch._foreach_add, root, given["eps"]))
    return [update.call(torch._foreach_div, corrected, scale), *state, v]


def _first_moment(
    update: UpdateGraph, spec: UpdateSpec, given: Mapping[str, Value], gradients: Value
) -> tuple[Value, Value]:
    """The EMA of the gradients, and its bias correction."""
    momentum, step = given["momentum"], given["step"]
    if not spec.own_momenta:
        new = update.call(torch._foreach_lerp, given["m"], gradients, 1 - momentum)
        return update.let("new_m", new), 1 - momentum**step
    old = update.call(torch._foreach_mul, given["m"], momentum)
    fresh = update.call(torch._foreach_mul, gradients, update.call(complements, momentum))
    new = update.let("new_m", update.call(torch._foreach_add, old, fresh))
    return new, update.call(complements_of_powers, momentum, step)


def _sgd(
    update: UpdateGraph, spec: UpdateSpec, given: Mapping[str, Value], gradients: Value
) -> list[Value]:
    """``p ← momentum p + ∇`` as in torch.optim.SGD: the direction, and p where there is one."""
    if "generic" not in spec.momentum:
        return [gradients]
    moved = update.call(torch._foreach_mul, given["m"], given["momentum"])
    new = update.let("new_m", update.call(torch._foreach_add, moved, gradients))
    return [new, new]
