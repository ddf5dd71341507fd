"""Generate the update of generic parameters: AdamW or SGD with momentum, one call for all."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from kfc_fx.codegen.pieces.context import Context
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.update_graph import Value

ADAMW_SECOND_MOMENT_DECAY = 0.999
ADAMW_EPS = 1e-8
"""Both torch.optim.AdamW's defaults."""


def moments_at_start(
    spec: UpdateSpec, gradient: Tensor, momentum: float, step: int
) -> tuple[Tensor, Tensor]:
    """Both moments from before a parameter's first step, which is the optimizer's ``step``-th.

    AdamW corrects them by the optimizer's own count. As if they had been of this gradient so far,
    they make of that what torch.optim.AdamW makes of its first; zeros where it is the first, and
    for SGD.
    """
    if spec.generic_rule == "sgd":
        return torch.zeros_like(gradient), torch.zeros_like(gradient)
    known = torch.nan_to_num(gradient, 0, 0, 0)  # whether it is finite is decided elsewhere
    first, second = (1 - decay ** (step - 1) for decay in (momentum, ADAMW_SECOND_MOMENT_DECAY))
    return known * first, known.square() * second


def generic_steps(context: Context) -> Value:
    """Steps to subtract from the generic parameters, a list in the order of the spec.

    New state goes into the result.
    """
    update, spec, arguments = context.update, context.spec, context.arguments
    count = len(spec.generic)
    rule = {"adamw": "AdamW", "sgd": "SGD"}[spec.generic_rule]
    update.section(f"{count} generic {'parameter' if count == 1 else 'parameters'}: {rule}")
    named = [arguments["gradients"][parameter.name] for parameter in spec.generic]
    named = [
        gradient.to(torch.float32) if parameter.converts else gradient
        for gradient, parameter in zip(named, spec.generic, strict=True)
    ]
    gradients = update.named_list("generic_gradients", named)
    direction = _adamw if spec.generic_rule == "adamw" else _sgd
    descent = direction(context, gradients)
    steps = update.call(torch._foreach_mul, descent, arguments["lr"]["generic"])
    return update.let("generic_steps", steps)


def _adamw(context: Context, gradients: Value) -> Value:
    """``m̂ / (sqrt(v̂) + ε)`` (Loshchilov & Hutter 2019, algorithm 2)."""
    update, arguments = context.update, context.arguments
    state, step, decay = arguments["state"], arguments["step"], ADAMW_SECOND_MOMENT_DECAY
    corrected = gradients
    if "generic" in context.spec.momentum:
        momentum = arguments["generic_momentum"]
        m = update.call(torch._foreach_lerp, state["generic_m"], gradients, 1 - momentum)
        context.result["generic_m"] = m = update.let("generic_m", m)
        corrected = update.call(torch._foreach_div, m, 1 - momentum**step)
    squares = update.call(torch._foreach_mul, gradients, gradients)
    v = update.call(
        torch._foreach_lerp, state["generic_v"], squares, update.call(operator.sub, 1, decay)
    )
    context.result["generic_v"] = v = update.let("generic_v", v)
    root = update.call(torch._foreach_sqrt, update.call(torch._foreach_div, v, 1 - decay**step))
    scale = update.let("generic_scale", update.call(torch._foreach_add, root, ADAMW_EPS))
    return update.call(torch._foreach_div, corrected, scale)


def _sgd(context: Context, gradients: Value) -> Value:
    """``p ← momentum p + ∇`` as in torch.optim.SGD."""
    update, arguments = context.update, context.arguments
    if "generic" not in context.spec.momentum:
        return gradients
    moved = update.call(
        torch._foreach_mul, arguments["state"]["generic_m"], arguments["generic_momentum"]
    )
    added = update.call(torch._foreach_add, moved, gradients)
    context.result["generic_m"] = added = update.let("generic_m", added)
    return added
