"""Generate a fifth scaling, which exists for a test: momentum over the root of Ω's mean."""

from __future__ import annotations

import torch

from kfc_fx.codegen.pieces.matrices import step_by_parameter
from kfc_fx.codegen.pieces.moments import first_moments, stacked_gradient, step_ahead
from kfc_fx.codegen.spec import StateEntry

SUMMARY = """One step along the momentum over the root of Ω's mean eigenvalue{ahead}."""
OPTIONS: tuple[str, ...] = ("gain",)
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = "The mean eigenvalue of all input factors."
FOLLOW_SUMMARY = ""
KEEPS_BASES = False
COUNTS_EXAMPLES = False


def state_entries(stack, *, momentum):
    entries = {"mean": StateEntry((stack.depth, 1, 1), "ones")}
    return entries | ({"m": StateEntry(stack.matrix_shape, "zeros")} if momentum else {})


def decompositions(spec, stack):
    return []


def refresh(local, made):
    mass = local.state("mass")
    diagonal = local.update.call(torch.diagonal, local.state("omega"), 0, 1, 2)
    return {"mean": diagonal.mean(1)[:, None, None] / mass}, [mass[:, 0, 0] <= 0]


def steps(context, stacks):
    one = stacks[0]
    gradients = [context.of_stack("gather", stack, stacked_gradient) for stack in stacks]
    ahead = context.update.named_list("gradients_of_stacks", gradients)
    if context.has_momentum(one):
        ahead = _ahead(context, stacks, gradients)
    for index, stack in enumerate(stacks):
        given = {"gradient": ahead[index], "lr": context.arguments["lr"][stack.key]}
        yield context.of_stack("step", stack, _step, gain=context.option("gain", stack), **given)


def _ahead(context, stacks, gradients):
    one = stacks[0]
    given = {"stacked": list(gradients), "m": context.states("m", stacks)}
    given["momentum"] = context.momentum(stacks)

    def body(update, values):
        own = context.spec.has_own_momenta(one.scaling)
        new_m = first_moments(update, values, values["stacked"], own=own)
        if not context.steps_ahead(one):
            return new_m
        return step_ahead(update, values["stacked"], new_m, values["momentum"])

    call = context.of_scaling("moments", one.scaling, "momentum", body, **given)
    new = context.update.let(context.name("m", one.scaling), call)
    context.keep("m", stacks, new)
    return new


def _step(local):
    rate = local.arguments["lr"] * local.arguments["gain"]
    step = local.arguments["gradient"] * -rate / local.state("mean") ** 0.5
    return step_by_parameter(local, step)
