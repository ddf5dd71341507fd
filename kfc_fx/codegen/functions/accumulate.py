"""Generate ``accumulate``: statistics of one step into the EMA of the factors."""

from __future__ import annotations

import torch

from kfc_fx.codegen.pieces.context import Context, StackContext
from kfc_fx.codegen.spec import UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.eigenbasis import from_basis

SUMMARY = """EMA of the factors: Ω = Σ a aᵀ / N and Γ = Σ g gᵀ / (N |T|).

``statistics`` holds the sums by "block.factor", ``examples`` is N, ``rows`` holds N |T| by stack,
one number for each layer. ``rate`` is 1 − decay, and 0 for a layer without a statistic in this
step. ``mass`` is the sum of the weights in the EMA, by which a factor is divided when it is used
(bias correction)."""
IN_BASIS = """

Between a refresh and the next statistic an EMA F is kept as its eigenbasis Q and the diagonal of
Qᵀ F Q."""


def accumulate_graph(spec: UpdateSpec) -> UpdateGraph:
    """``accumulate(statistics, examples, rows, rate, state) -> {stack: new state entries}``."""
    in_basis = any(spec.factors_in_basis_of(stack) for stack in spec.stacks)
    update = UpdateGraph("accumulate", SUMMARY + IN_BASIS * in_basis)
    names = ("statistics", "examples", "rows", "rate", "state")
    given = {name: update.argument(name) for name in names}
    context = Context(update, spec, given)
    found = {}
    for stack in spec.stacks:
        own = {name: given[name][stack.key] for name in ("rows", "rate")}
        shared = {name: given[name] for name in ("statistics", "examples")}
        found[stack.key] = context.of_stack("accumulate", stack, _entries, **shared, **own)
    return update.finish(found)


def _entries(local: StackContext) -> dict[str, Value]:
    update, stack, given = local.update, local.stack, local.arguments
    examples, rows, rate = given["examples"], given["rows"], given["rate"]
    result: dict[str, Value] = {}
    for factor in stack.factor_shapes:
        fresh = _mean(local, factor, rows if factor == "gamma" else examples)
        weight = rate
        if stack.parts[factor] > 1:
            weight = weight.repeat_interleave(stack.parts[factor], 0)
        result[factor] = update.call(torch.lerp, _before(local, factor), fresh, weight)
    mass = local.state("mass")
    result["mass"] = mass + rate * (1 - mass)
    if stack.has_bias_apart:
        before = local.state("locations")
        result["locations"] = update.call(torch.lerp, before, rows / examples, rate)
    if stack.counts_examples:
        result["examples"] = update.call(torch.where, rate > 0, examples, local.state("examples"))
    return result


def _mean(local: StackContext, factor: str, count: Value) -> Value:
    """The factor of this step; ``count`` is one number, or one for each entry of the stack."""
    update, stack, statistics = local.update, local.stack, local.arguments["statistics"]
    sums = [statistics[f"{block.name}.{factor}"] for block in stack.blocks]
    total = sums[0] if len(sums) == 1 else update.call(torch.cat, sums)
    if factor == "gamma" and stack.parts[factor] > 1:
        count = count.repeat_interleave(stack.parts[factor], 0)
    return update.let(factor, total / count, stack.factor_shapes[factor])


def _before(local: StackContext, factor: str) -> Value:
    """The EMA so far, written out where it is kept in its basis."""
    if factor not in local.spec.factors_in_basis_of(local.stack):
        return local.state(factor)
    basis, values = local.state(f"q_{factor}"), local.state(f"eigenvalues_{factor}")
    return local.update.call(from_basis, basis, values)
