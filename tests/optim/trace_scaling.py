"""Generate a fifth scaling, which exists for a test: momentum over the root of Ω's mean."""

from __future__ import annotations

import torch

from kfc_fx.codegen.pieces.moments import first_moments, stacked_gradient
from kfc_fx.codegen.spec import StateEntry

SUMMARY = """The momentum over the root of Ω's mean eigenvalue{ahead}."""
OPTIONS: tuple[str, ...] = ("gain",)
REFRESH_OPTIONS: tuple[str, ...] = ()
REFRESH_SUMMARY = "The mean eigenvalue of all input factors."
START_SUMMARY: str | None = None
KEEPS_BASES = False
COUNTS_EXAMPLES = False


def state_entries(stack, *, momentum):
    entries = {"mean": StateEntry((stack.depth, 1, 1), "ones")}
    return entries | ({"m": StateEntry(stack.matrix_shape, "zeros")} if momentum else {})


def decompositions(context, stack, *, first):
    return []


def refresh(context, stack, *, first):
    update, mass = context.update, context.state("mass", stack)
    diagonal = update.call(torch.diagonal, context.state("omega", stack), 0, 1, 2)
    mean = diagonal.mean(1)[:, None, None] / mass
    context.result[f"mean_{stack.key}"] = update.let(f"mean_{stack.key}", mean, (stack.depth, 1, 1))
    return [mass[:, 0, 0] <= 0]


def steps(context, stacks):
    update = context.update
    found = [stacked_gradient(context, stack) for stack in stacks]
    ahead = first_moments(context, stacks, update.named_list("gradients_of_stacks", found))
    for index, stack in enumerate(stacks):
        rate = context.arguments["lr"][stack.key] * context.option("gain", stack)
        yield context.step(stack, ahead[index] * -rate / context.state("mean", stack) ** 0.5)
