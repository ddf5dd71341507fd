"""Generate ``accumulate``: statistics of one step into the EMA of the factors."""

from __future__ import annotations

import torch

from kfc_fx.codegen.spec import StackSpec, UpdateSpec
from kfc_fx.codegen.text.update_graph import UpdateGraph, Value
from kfc_fx.linalg.eigenbasis import from_basis

SUMMARY = """EMA of the factors: Ω = Σ a aᵀ / N and Γ = Σ g gᵀ / (N |T|).

    ``statistics`` holds the sums by "block.factor", ``examples`` is N, ``rows`` N |T| per block.
    ``rate`` is 1 − decay, and 0 for a block without a statistic in this step; ``mass`` is the sum
    of the weights in the EMA, by which a factor is divided when it is used (bias correction)."""
IN_BASIS = """

    Between a refresh and the next statistic an EMA F is its eigenbasis Q and the diagonal of
    Qᵀ F Q."""


def accumulate_graph(spec: UpdateSpec) -> UpdateGraph:
    """``accumulate(statistics, examples, rows, rate, state) -> new state entries``."""
    in_basis = any(spec.factors_in_basis_of(stack) for stack in spec.stacks)
    update = UpdateGraph("accumulate", SUMMARY + IN_BASIS * in_basis + "\n    ")
    names = ("statistics", "examples", "rows", "rate", "state")
    statistics, examples, rows, rate, state = (update.argument(name) for name in names)
    result: dict[str, Value] = {}
    for stack in spec.stacks:
        update.section(describe(stack))
        key = stack.key
        for factor in stack.factor_shapes:
            count = rows[key] if factor == "gamma" else examples
            fresh = _mean(update, stack, factor, statistics, count)
            before, weight = _before(update, spec, stack, factor, state), rate[key]
            if stack.parts[factor] > 1:
                weight = weight.repeat_interleave(stack.parts[factor], 0)
            result[f"{factor}_{key}"] = update.call(torch.lerp, before, fresh, weight)
        mass = state[f"mass_{key}"]
        result[f"mass_{key}"] = mass + rate[key] * (1 - mass)
        if stack.has_bias_apart:
            result[f"locations_{key}"] = update.call(
                torch.lerp, state[f"locations_{key}"], rows[key] / examples, rate[key]
            )
        if stack.counts_examples:
            result[f"examples_{key}"] = update.call(
                torch.where, rate[key] > 0, examples, state[f"examples_{key}"]
            )
    return update.finish(result)


def _mean(
    update: UpdateGraph, stack: StackSpec, factor: str, statistics: Value, count: Value
) -> Value:
    """The factor of this step; ``count`` is one number, or one for each entry of the stack."""
    sums = [statistics[f"{block.name}.{factor}"] for block in stack.blocks]
    total = sums[0] if len(sums) == 1 else update.call(torch.cat, sums)
    if factor == "gamma" and stack.parts[factor] > 1:
        count = count.repeat_interleave(stack.parts[factor], 0)
    return update.let(f"{factor}_{stack.key}", total / count, stack.factor_shapes[factor])


def _before(
    update: UpdateGraph, spec: UpdateSpec, stack: StackSpec, factor: str, state: Value
) -> Value:
    """The EMA so far, written out where it is kept in its basis."""
    name = f"{factor}_{stack.key}"
    if factor not in spec.factors_in_basis_of(stack):
        return state[name]
    return update.call(from_basis, state[f"q_{name}"], state[f"eigenvalues_{name}"])


def describe(stack: StackSpec) -> str:
    """One comment line: shape and members of a stack."""
    names = ", ".join(block.name or "the model itself" for block in stack.blocks)
    grouped = f" in {stack.depth} groups" if stack.depth > len(stack.blocks) else ""
    layers = "1 layer" if len(stack.blocks) == 1 else f"{len(stack.blocks)} layers"
    return f"{stack.key}: {layers}{grouped}: {names}"
